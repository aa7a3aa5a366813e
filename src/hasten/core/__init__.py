"""Types that all other packages share; imports neither torch nor a server."""
