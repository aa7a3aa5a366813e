"""`hasten cluster completion`: scripts by which a shell completes the commands and options of hasten."""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.cli.cluster.parser import VerbParser, VerbParsers

SHELLS = ("bash", "zsh", "fish")

# what bash and zsh have in common: `local` and `case` mean the same in both
_COMMON = """\
# prints what may follow a command; false where there is no such command
_hasten_words() {{
    case "$1" in
{words}
        *) return 1 ;;
    esac
}}

# prints the values that an option of a command takes; false where they are not known
_hasten_values() {{
    case "$1" in
{values}
        *) return 1 ;;
    esac
}}

# prints what may follow the words $1, $2, ..., the first of which is the program
_hasten_candidates() {{
    local command=hasten last='' word
    shift
    for word in "$@"; do
        last="$word"
        if _hasten_words "$command $word" > /dev/null; then command="$command $word"; fi
    done
    _hasten_values "$command $last" || _hasten_words "$command"
}}
"""

_BASH = """
_hasten() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(_hasten_candidates "${COMP_WORDS[@]:0:COMP_CWORD}")" -- "${COMP_WORDS[COMP_CWORD]}"))
}

complete -o default -F _hasten hasten
"""

_ZSH = """
_hasten() {
    local -a candidates
    candidates=("${(@f)$(_hasten_candidates "${(@)words[1,CURRENT-1]}")}")
    compadd -a candidates
    _files
}

compdef _hasten hasten
"""

_FISH = """\
# prints what may follow a command; false where there is no such command
function __hasten_words
    switch "$argv[1]"
{words}
        case '*'
            return 1
    end
end

# prints the values that an option of a command takes; false where they are not known
function __hasten_values
    switch "$argv[1]"
{values}
        case '*'
            return 1
    end
end

function __hasten_candidates
    set -l command hasten
    set -l last ''
    for word in (commandline -opc)[2..-1]
        set last $word
        if __hasten_words "$command $word" > /dev/null
            set command "$command $word"
        end
    end
    __hasten_values "$command $last"; or __hasten_words $command
end

complete -c hasten -a '(__hasten_candidates)'
"""


def add_parser(verbs: VerbParsers) -> None:
    """Add `completion`."""
    parser = verbs.add_parser(
        "completion",
        help="print a script for a shell's completion",
        description="Print a script by which a shell completes hasten's commands and options: "
        "`source <(hasten cluster completion bash)`, or `hasten cluster completion fish | source`.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from hasten.cli.main import build_parser

    print(script(args.shell, list(_verbs("hasten", build_parser()))), end="")
    return 0


@dataclass(frozen=True)
class _Verb:
    """A command of the tree: `hasten cluster list`."""

    path: str
    words: list[str]
    values: dict[str, list[str]]
    """What an option takes, by its spelling."""


def _verbs(path: str, parser: argparse.ArgumentParser) -> Iterator[_Verb]:
    words: list[str] = []
    values: dict[str, list[str]] = {}
    children: dict[str, argparse.ArgumentParser] = {}
    actions = parser.filled()._actions if isinstance(parser, VerbParser) else parser._actions
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            children = {name: child for name, child in action.choices.items() if not _refused(child)}
            continue
        words += action.option_strings or list(action.choices or ())
        values |= {flag: list(action.choices) for flag in action.option_strings if action.choices}
    yield _Verb(path, [*children, *words], values)
    for name, child in children.items():
        yield from _verbs(f"{path} {name}", child)


def _refused(parser: argparse.ArgumentParser) -> bool:
    return isinstance(parser, VerbParser) and parser.refusal is not None


def script(shell: str, verbs: list[_Verb]) -> str:
    """The script of one shell."""
    words = {verb.path: verb.words for verb in verbs}
    values = {f"{verb.path} {flag}": found for verb in verbs for flag, found in verb.values.items()}
    if shell == "fish":
        return _FISH.format(words=_fish_cases(words), values=_fish_cases(values))
    common = _COMMON.format(words=_cases(words), values=_cases(values))
    return f"#compdef hasten\n{common}{_ZSH}" if shell == "zsh" else common + _BASH


def _cases(found: dict[str, list[str]]) -> str:
    return "\n".join(
        f"        {shlex.quote(key)}) printf '%s\\n' {shlex.join(words)} ;;" for key, words in found.items()
    )


def _fish_cases(found: dict[str, list[str]]) -> str:
    return "\n".join(
        f"        case {shlex.quote(key)}\n            printf '%s\\n' {shlex.join(words)}"
        for key, words in found.items()
    )
