"""Write short stories whose last word can be known only from what was said sentences earlier.

One JSON line a story, `{"text": ...}`, as in LAMBADA; the text ends with the word itself. The same
arguments write the same bytes on every machine and every supported Python.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from lexicon import LEXICON, Name, Noun
from plots import DISTRACTIONS, FILLERS, OPENERS, PLOTS, Plot

Word = Noun | Name

TEST_SEED: Final = 2024
TEST_COUNT: Final = 512
MIN_WORDS: Final = 50
MAX_WORDS: Final = 90
MAX_SENTENCES: Final = 8


class StoryError(ValueError):
    """A bad argument or file, told in one line."""


def answer_kind(plot: Plot) -> str:
    """The kind of the word that ends this plot."""
    return plot.slots[plot.answer]


def _cast(rng: random.Random, plot: Plot) -> dict[str, Word]:
    """A different word for every slot of the plot and for the distraction."""
    slots: dict[str, list[str]] = {}
    for slot, kind in (*plot.slots.items(), ("Z", answer_kind(plot))):
        slots.setdefault(kind, []).append(slot)
    return {
        slot: word
        for kind, names in slots.items()
        for slot, word in zip(names, rng.sample(LEXICON[kind], len(names)), strict=True)
    }


def _templates(rng: random.Random, plot: Plot) -> list[str]:
    """The sentences of one telling, with the answer at least two sentences before the last."""
    facts = [rng.choice(phrasings) for phrasings in plot.facts]
    if plot.shuffled:
        rng.shuffle(facts)
    opener = [rng.choice(OPENERS)] if rng.random() < 0.4 else []
    room = MAX_SENTENCES - len(facts) - len(opener) - 2
    middle = rng.sample(FILLERS, rng.randint(1, min(3, room)))
    if rng.random() < 0.6:
        middle[0] = rng.choice(DISTRACTIONS[answer_kind(plot)])
    middle.append(rng.choice(plot.bridge))
    rng.shuffle(middle)
    return [*opener, *facts, *middle, rng.choice(plot.endings)]


def story(rng: random.Random) -> str:
    """One story of 50 to 90 words."""
    while True:
        plot = rng.choice(PLOTS)
        words = _cast(rng, plot)
        text = " ".join(_templates(rng, plot)).format_map(words)
        if MIN_WORDS <= text.count(" ") + 1 <= MAX_WORDS:
            return text


def stories(seed: int | str, *, exclude: Collection[str] = frozenset()) -> Iterator[str]:
    """Stories without end, no two the same and none of them in `exclude`."""
    rng = random.Random(seed)
    seen = set(exclude)
    while True:
        text = story(rng)
        if text not in seen:
            seen.add(text)
            yield text


def read_stories(path: Path) -> list[str]:
    """The texts of a file of JSON lines; `StoryError` names the file and the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoryError(f"cannot read {path}: {error}") from error
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise StoryError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise StoryError(f'{path}, line {number}: expected {{"text": "..."}}')
        texts.append(record["text"])
    return texts


def write_stories(path: Path, texts: Collection[str]) -> None:
    """Write JSON lines beside `path`, then rename, so that no half-written file is left."""
    # The rename would put a plain file in the place of a device or a pipe such as /dev/null.
    if path.exists() and not path.is_file():
        raise StoryError(f"cannot write {path}: it is not a regular file")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        partial.replace(path)
    except OSError as error:
        raise StoryError(f"cannot write {path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write short stories whose last word can be known only from what was said "
        "sentences earlier, as JSON lines.",
    )
    parser.add_argument("--count", type=int, required=True, help="how many stories, at least 1")
    parser.add_argument("--seed", type=int, required=True, help="same seed, same stories")
    parser.add_argument("--exclude", type=Path, help="JSON lines with stories not to write")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when done, 2 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    try:
        if args.count < 1:
            raise StoryError(f"--count must be at least 1, got {args.count}")
        exclude = read_stories(args.exclude) if args.exclude else []
        source = stories(args.seed, exclude=exclude)
        write_stories(args.output, [next(source) for _ in range(args.count)])
    except StoryError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
