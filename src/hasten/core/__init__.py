"""The words that every other room uses; imports neither torch nor a server."""
