"""What happens in the stories: each plot's sentences, with several phrasings of each.

In a template `{A}` to `{D}` are people and the other slots are words of the kinds that the plot
names; `Z` is always one more word of the answer's kind, for the sentence that distracts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: facts (told in any order if `shuffled`), then a bridge, then an ending."""

    name: str
    answer: str
    slots: Mapping[str, str]
    facts: tuple[tuple[str, ...], ...]
    bridge: tuple[str, ...]
    endings: tuple[str, ...]
    shuffled: bool = field(default=True)


OPENERS: Final = (
    "It was a cold morning in late autumn.",
    "It had rained all week, and the roads were full of mud.",
    "The first days of summer had come at last.",
    "Snow lay deep on the roofs of the town.",
    "Nobody in the village could remember a quieter winter.",
    "The evening began like any other.",
    "Everyone in the family was awake before sunrise.",
    "A strong wind had been blowing since midnight.",
    "That year the spring came early.",
    "The holidays had only just begun.",
)

FILLERS: Final = (
    "The hours went by slowly, and the rain did not stop.",
    "Outside, the wind was shaking the branches of the old trees.",
    "For a long time nothing else happened.",
    "Somewhere far away a bell rang seven times.",
    "{A} drank a cup of tea and looked out of the window.",
    "{A} hardly slept that night.",
    "The next day was warm and bright.",
    "Then the snow began to fall, thick and silent.",
    "Weeks passed, and life went on as before.",
    "Nobody said very much at supper.",
    "{A} sat down by the fire and read the newspaper.",
    "In the evening the whole street smelled of smoke and fresh bread.",
    "There was a great deal of work to do, and {A} did most of it alone.",
    "The children next door were singing the same song again and again.",
    "{A} had a headache and wished that the noise would end.",
    "A storm came up from the sea and was gone within the hour.",
    "By now it was getting late, and the lamps were being lit.",
    "{A} counted the coins in {A.his} pocket and sighed.",
    "It took much longer than {A} had expected.",
    "The neighbours talked of little but the weather.",
    "{A} put on {A.his} coat and walked along the river for a while.",
    "All this was soon forgotten, or so it seemed.",
    "The sun went down behind the hills.",
    "{A} wrote a few lines to {A.his} sister and went to bed early.",
)

DISTRACTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "name": (
        "{Z} called out a greeting from across the street.",
        "Earlier that day someone had seen {Z} walking by the river.",
        "{Z} knew nothing about any of this.",
        "{A} waved to {Z}, who did not wave back.",
        "There was talk that {Z} would be married in the spring.",
    ),
    "object": (
        "A stranger hurried past with {Z.a} in both arms.",
        "A man at the corner offered {A} {Z.a} for a few coins, but {A.he} shook {A.his} head.",
        "On the way {A} almost fell over {Z.a} that somebody had left on the steps.",
        "In the newspaper there was a long report about a stolen {Z}.",
        "{A} dreamed of {Z.a} as large as a house.",
    ),
    "place": (
        "{A} passed the {Z} without stopping.",
        "A notice said that the {Z} would stay closed until spring.",
        "People said that there had been a fire at the {Z}.",
        "From far off one could hear the crowd at the {Z}.",
        "{A} had never much liked the {Z}.",
    ),
    "animal": (
        "Somewhere behind the wall {Z.a} was making a great noise.",
        "On the way {A} saw {Z.a} standing in the tall grass.",
        "An old man on the bench told a long story about {Z.a}.",
        "There was a picture of {Z.a} on the wall.",
    ),
    "colour": (
        "In the branches of the tree hung {Z.a} flag.",
        "A man in {Z.a} hat stopped to look.",
        "The sky over the hills had turned almost {Z}.",
        "A small {Z} boat went down the river.",
    ),
    "food": (
        "The whole street smelled of {Z}.",
        "At the next table somebody was complaining about the {Z}.",
        "There was a sign in the window about the price of {Z}.",
        "{A} had once eaten nothing but {Z} for a whole week.",
    ),
    "trade": (
        "Just then {Z.a} came in and asked for the time.",
        "An old {Z} was asleep on the bench by the door.",
        "In the street {Z.a} was arguing with a policeman.",
        "{A} nodded to the {Z} who lived upstairs.",
    ),
    "instrument": (
        "Somewhere down the street somebody was playing the {Z} very badly.",
        "On the wall hung an old picture of a girl with {Z.a}.",
        "A broken {Z} had been lying on the steps for days.",
        "{A} had never cared for the sound of the {Z}.",
    ),
    "city": (
        "The newspapers wrote of a great flood in {Z}.",
        "On the platform two women were talking about {Z}.",
        "An old map of {Z} hung on the wall.",
        "{A} had an uncle in {Z}, but they had not spoken for years.",
    ),
}

PLOTS: Final = (
    Plot(
        name="hiding",
        answer="X",
        slots={"A": "name", "B": "name", "X": "object", "Y": "object", "P": "place"},
        facts=(
            (
                "{A} had hidden {X.a} under the floor, where no one would look for it.",
                "Before anyone was awake, {A} took {X.a} and hid it under the floor.",
                "Under the floor of {A.his} room {A} kept {X.a} hidden from everybody.",
            ),
            (
                "{B} had hidden {Y.a} behind the chimney.",
                "Behind the chimney {B} was hiding {Y.a}.",
                "{B}, too, had a secret, and it was {Y.a} behind the chimney.",
            ),
        ),
        bridge=(
            "When the strangers had left the {P}, it was safe to come back.",
            "The house was searched twice, but nothing was ever found.",
            "Then came the day when everyone went to the {P} and the house was empty.",
        ),
        endings=(
            "As soon as it was dark, {A} lifted the boards of the floor and took out the {X}",
            "{A} went to {A.his} room, knelt down on the floor and pulled out the {X}",
            "At last {A} could open the floor again, and there, full of dust, lay the {X}",
        ),
    ),
    Plot(
        name="birthday",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "C": "name",
            "X": "object",
            "Y": "object",
            "V": "object",
        },
        facts=(
            (
                "For the birthday of {A}, {B} had chosen {X.a}.",
                "{B} had bought {X.a} as a present for {A}.",
                "{B} spent all {B.his} money on {X.a} for {A}.",
            ),
            (
                "{C} had chosen {Y.a}.",
                "{C} thought that {Y.a} would be a better present.",
                "{C} came with {Y.a} in a paper bag.",
            ),
            (
                "{A} had secretly wished for {V.a}.",
                "What {A} really wanted was {V.a}, but that cost too much.",
            ),
        ),
        bridge=(
            "After the cake all the presents lay on the table, and {A} was told to begin.",
            "At the party there was music, and {A} blew out the candles.",
            "When the guests had sat down, the presents were brought in.",
        ),
        endings=(
            "{A} first opened the one from {B} and found the {X}",
            "The parcel from {B} was tied with string, and in it {A} saw the {X}",
            "Smiling, {A} turned to {B} and said thank you for the {X}",
        ),
    ),
    Plot(
        name="lost",
        answer="X",
        slots={"A": "name", "B": "name", "X": "object", "Y": "object", "P": "place"},
        facts=(
            (
                "{A} noticed that {A.his} {X} was gone.",
                "On the way to the {P} {A} lost {A.his} {X}.",
                "Somewhere near the {P} {A} must have dropped {A.his} {X}.",
            ),
            (
                "Luckily {A.he} still had {A.his} {Y}.",
                "The {Y} was still safe in {A.his} bag.",
                "{A.He} was glad that at least the {Y} had not been lost.",
            ),
        ),
        bridge=(
            "{B} helped to look for it, but they found nothing.",
            "{A} asked {B} and everybody else, but nobody had seen it.",
            "They searched the grass until dark and then gave up.",
        ),
        endings=(
            "On Friday a boy knocked at the door of {A} and held out the lost {X}",
            "A week later {B} came running with good news, for someone had found the {X}",
            "Then, in the pocket of an old coat, {A} suddenly felt the missing {X}",
        ),
        shuffled=False,
    ),
    Plot(
        name="repair",
        answer="X",
        slots={"A": "name", "B": "name", "C": "name", "X": "object", "Y": "object"},
        facts=(
            (
                "{A} brought {X.a} to be mended.",
                "{A} asked {C} to mend {X.a} that had been broken for years.",
                "{A} came into the shop of {C} with a broken {X}.",
            ),
            (
                "{B} brought {Y.a} to be mended.",
                "{B} asked {C} to mend {Y.a} that had been broken for years.",
                "{B} came into the shop of {C} with a broken {Y}.",
            ),
        ),
        bridge=(
            "{C} promised that everything would be ready on Monday.",
            "{C} had a lot to do and worked late into the night.",
            "{C} wrote both names into a thick book and said that it would take a week.",
        ),
        endings=(
            "When {A} came back to the shop, {C} went to the shelf and handed {A.him} the {X}",
            "On Monday {C} sent word to {A} that it was time to fetch the {X}",
            "{A} paid {C} for the work and carried home the mended {X}",
        ),
    ),
    Plot(
        name="swap",
        answer="Y",
        slots={"A": "name", "B": "name", "X": "object", "Y": "object", "P": "place"},
        facts=(
            (
                "{A} owned {X.a}.",
                "{A} had {X.a} that {A.he} no longer needed.",
                "For years {A} had kept {X.a} in the {P}.",
            ),
            (
                "{B} owned {Y.a}.",
                "{B} had {Y.a} that {B.he} no longer needed.",
                "For years {B} had kept {Y.a} under the bed.",
            ),
        ),
        bridge=(
            "One afternoon they met and agreed to swap, and both were happy.",
            "They talked about it for a while and then made an exchange.",
            "Each wanted what the other had, so they simply traded.",
        ),
        endings=(
            "That night {A} could not stop looking at {A.his} new {Y}",
            "Afterwards {A} went home and showed everybody {A.his} new {Y}",
            "{A} was sure that nobody would ever take from {A.him} the {Y}",
        ),
    ),
    Plot(
        name="will",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "C": "name",
            "X": "object",
            "Y": "object",
            "V": "object",
        },
        facts=(
            (
                "To {A} the old woman left {X.a}.",
                "{A} was to have {X.a}.",
                "In her will the old woman gave {A} {X.a}.",
            ),
            (
                "To {B} the old woman left {Y.a}.",
                "{B} was to have {Y.a}.",
                "In her will the old woman gave {B} {Y.a}.",
            ),
            (
                "To {C} the old woman left {V.a}.",
                "{C} was to have {V.a}.",
                "In her will the old woman gave {C} {V.a}.",
            ),
        ),
        bridge=(
            "The three had not expected anything, and they were silent for a while.",
            "When the will had been read, they all went home.",
            "They thought of her kind face and her stories.",
        ),
        endings=(
            "From then on {A} never went anywhere without the {X}",
            "Many years later {A} still had the {X}",
            "Whenever {A} thought of the old woman, {A.he} took out the {X}",
        ),
    ),
    Plot(
        name="visit",
        answer="B",
        slots={"A": "name", "B": "name", "C": "name", "P": "place", "X": "object"},
        facts=(
            (
                "{A} had promised to visit {B} before the end of the month.",
                "For weeks {A} had been promising {B} a visit.",
                "{A} had given {A.his} word to visit {B} on Sunday.",
            ),
            (
                "{A} had also promised {C} a letter.",
                "There was still a letter to be written to {C}.",
                "{C} was waiting only for a letter.",
            ),
        ),
        bridge=(
            "On Sunday {A} bought flowers and took the road past the {P}.",
            "So {A} packed {X.a} as a gift and set out on foot.",
            "In the end {A} found the time, and the bus was almost empty.",
        ),
        endings=(
            "{A} rang the bell for this visit, and the door was opened by {B}",
            "When {A} arrived for the visit, there on the steps stood {B}",
            "A promise is a promise, thought {A}, and rang at the door of {B}",
        ),
    ),
    Plot(
        name="borrowing",
        answer="B",
        slots={"A": "name", "B": "name", "C": "name", "X": "object", "Y": "object"},
        facts=(
            (
                "{A} had borrowed {X.a} from {B}.",
                "From {B} {A} had borrowed {X.a}.",
                "The {X} that {A} was using belonged to {B}.",
            ),
            (
                "{A} had borrowed {Y.a} from {C}.",
                "From {C} {A} had borrowed {Y.a}.",
                "The {Y} that {A} was using belonged to {C}.",
            ),
        ),
        bridge=(
            "Now that the work was done, it was time to give things back.",
            "Borrowed things should be returned, and {A} knew it.",
            "{A} was ashamed of having kept everything so long.",
        ),
        endings=(
            "So {A} cleaned the {X} and carried it back to {B}",
            "With the {X} under {A.his} arm {A} walked to the house of {B}",
            "That same evening {A} returned the {X} to {B}",
        ),
    ),
    Plot(
        name="race",
        answer="B",
        slots={"A": "name", "B": "name", "C": "name", "P": "place", "X": "object"},
        facts=(
            (
                "{B} came first, a whole minute before the others.",
                "Everybody saw that {B} was the fastest and had won.",
                "The winner, to the surprise of all, was {B}.",
            ),
            (
                "{C} came last.",
                "{C} fell and hurt a knee.",
                "{C} was tired and gave up.",
            ),
            (
                "{A} was the judge of the race.",
                "It was the task of {A} to judge the race.",
            ),
        ),
        bridge=(
            "Afterwards all of them met at the {P}, where the prize was waiting.",
            "The prize was {X.a}, and the crowd was eager to see it.",
            "When the crowd was quiet again, a short speech was made.",
        ),
        endings=(
            "Then {A} raised a hand and gave the prize to {B}",
            "{A} called out the name of the winner, and forward stepped {B}",
            "To great cheers {A} shook hands with the winner, {B}",
        ),
    ),
    Plot(
        name="secret",
        answer="B",
        slots={"A": "name", "B": "name", "C": "name", "X": "object", "P": "place"},
        facts=(
            (
                "{A} told only {B} where the {X} was buried.",
                "{A} had shared the secret of the {X} with {B} and no one else.",
                "Only to {B} did {A} whisper where the {X} was buried.",
            ),
            (
                "{C} was never told.",
                "{A} took care that {C} heard nothing.",
                "{C} asked many questions but got no answer.",
            ),
        ),
        bridge=(
            "Then one morning the whole village was digging behind the {P}.",
            "By the end of the week everybody at the {P} knew the secret.",
            "Soon strangers with maps came to the {P}.",
        ),
        endings=(
            "{A} was angry, for the secret could only have been given away by {B}",
            "There was just one person who could have talked, and that was {B}",
            "Never again, said {A}, would {A.he} tell a secret to {B}",
        ),
    ),
    Plot(
        name="left",
        answer="P",
        slots={
            "A": "name",
            "B": "name",
            "X": "object",
            "Y": "object",
            "P": "place",
            "Q": "place",
        },
        facts=(
            (
                "{A} had left the {X} at the {P}.",
                "The {X} had been left behind at the {P}.",
                "The {X} was still standing in a corner of the {P}.",
            ),
            (
                "{A} had left the {Y} at the {Q}.",
                "The {Y} had been left behind at the {Q}.",
                "The {Y} was still standing in a corner of the {Q}.",
            ),
        ),
        bridge=(
            "{B} came by and asked for help.",
            "Only when {B} asked about it did {A} remember.",
            "At home {A} unpacked everything with {B} and saw what was missing.",
        ),
        endings=(
            "{A} needed the {X} at once, so {A.he} ran back to the {P}",
            "If you want the {X}, said {A}, you must go to the {P}",
            "To fetch the {X}, {A} and {B} had to return to the {P}",
        ),
    ),
    Plot(
        name="moving",
        answer="Q",
        slots={"A": "name", "B": "name", "X": "object", "P": "place", "Q": "place"},
        facts=(
            (
                "For many years the {X} of {A} stood in the {P}.",
                "At first {A} kept the {X} in the {P}.",
                "Once upon a time {A} had put the {X} in the {P}.",
            ),
            (
                "Then {B} carried it over to the {Q}.",
                "One night {B} moved it to the {Q}, where it was dry.",
                "But {B} thought that it would be safer in the {Q} and took it there.",
            ),
        ),
        bridge=(
            "Nobody touched it again after that.",
            "There it stayed, and dust settled upon it.",
            "It was heavy work, and it was not moved a second time.",
        ),
        endings=(
            "When {A} asked where the {X} was now, {B} pointed to the {Q}",
            "So whoever wants to see the {X} today must go to the {Q}",
            "Today {A} still has the {X}, and it is in the {Q}",
        ),
        shuffled=False,
    ),
    Plot(
        name="meeting",
        answer="P",
        slots={"A": "name", "B": "name", "C": "name", "P": "place", "Q": "place"},
        facts=(
            (
                "{A} was to meet {B} at the {P}.",
                "{A} and {B} had agreed to meet at the {P}.",
                "{B} had written to {A} that they should meet at the {P}.",
            ),
            (
                "{C} was waiting at the {Q}.",
                "{C}, however, wanted to be met at the {Q}.",
                "{C} spent the day at the {Q}.",
            ),
        ),
        bridge=(
            "It was almost noon, and {A} had not even left the house.",
            "There was no time to lose, and {A} ran down the stairs.",
            "{A} looked at the clock and jumped up from the chair.",
        ),
        endings=(
            "Out of breath, {A} reached {B}, who was standing in front of the {P}",
            "To be with {B} in time, {A} took the shortest way to the {P}",
            "{A} was late, but {B} had waited patiently at the {P}",
        ),
    ),
    Plot(
        name="pets",
        answer="X",
        slots={"A": "name", "B": "name", "C": "name", "X": "animal", "Y": "animal"},
        facts=(
            (
                "{A} kept {X.a}.",
                "{A} had a tame {X}.",
                "The animal that {A} had brought home was {X.a}.",
            ),
            (
                "{B} kept {Y.a}.",
                "{B} had a tame {Y}.",
                "The animal that {B} had brought home was {Y.a}.",
            ),
        ),
        bridge=(
            "One night the gate was open, and in the morning every animal was gone.",
            "When they had to travel, {C} agreed to feed the animals.",
            "{C} said that no animal should live in a house.",
        ),
        endings=(
            "{A} could think of nothing but {A.his} {X}",
            "With tears in {A.his} eyes {A} asked {C} about the {X}",
            "But nothing in the world could part {A} from the {X}",
        ),
    ),
    Plot(
        name="rescue",
        answer="X",
        slots={"A": "name", "B": "name", "X": "animal", "Y": "animal", "P": "place"},
        facts=(
            (
                "Near the {P} {A} found {X.a} with a hurt leg.",
                "{A} came upon {X.a} that could not walk.",
                "One day {A} heard a cry and saw {X.a} caught in a net.",
            ),
            (
                "Not far away {Y.a} was watching.",
                "A moment later {Y.a} ran away into the bushes.",
                "There was {Y.a} as well, but it was not hurt.",
            ),
        ),
        bridge=(
            "{A} carried the poor creature home, and {B} bandaged its leg.",
            "{B} brought milk and a warm cloth for the patient.",
            "For ten days {A} and {B} took care of the creature that had been hurt.",
        ),
        endings=(
            "When it was well again, {A} opened the gate and set free the {X}",
            "In the end, strong and healthy, away went the {X}",
            "{A} and {B} were sad when they had to say goodbye to the {X}",
        ),
        shuffled=False,
    ),
    Plot(
        name="doors",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "C": "name",
            "X": "colour",
            "Y": "colour",
            "P": "place",
        },
        facts=(
            (
                "{A} painted {A.his} door {X}.",
                "The door of {A} had been painted {X}.",
                "{A} wanted {X.a} door and painted it at once.",
            ),
            (
                "{B} painted {B.his} door {Y}.",
                "The door of {B} had been painted {Y}.",
                "{B} wanted {Y.a} door and painted it at once.",
            ),
        ),
        bridge=(
            "{C} had to bring a letter but had never been in that street.",
            "{C} asked at the {P} which house was which.",
            "From the {P} to the river all the houses looked alike but for their doors.",
        ),
        endings=(
            "To find {A}, {C} was told, look for the door that is {X}",
            "The house of {A} was easy to find, because its door was {X}",
            "{C} wanted to see {A}, so {C.he} knocked at the door that was {X}",
        ),
    ),
    Plot(
        name="wool",
        answer="X",
        slots={"A": "name", "B": "name", "C": "name", "X": "colour", "Y": "colour"},
        facts=(
            (
                "{A} asked for a scarf in {X}.",
                "The scarf for {A} should be {X}.",
                "{A} had always liked {X} best.",
            ),
            (
                "{B} asked for a scarf in {Y}.",
                "The scarf for {B} should be {Y}.",
                "{B} had always liked {Y} best.",
            ),
        ),
        bridge=(
            "{C} bought the wool and sat down to knit.",
            "{C} needed three evenings for each scarf.",
            "{C} was quick with wool and did not forget a wish.",
        ),
        endings=(
            "The scarf that {C} gave to {A} was long and warm and {X}",
            "When {A} opened the parcel from {C}, the wool was {X}",
            "At the first frost one saw {A} in a scarf of {X}",
        ),
    ),
    Plot(
        name="supper",
        answer="X",
        slots={"A": "name", "B": "name", "C": "name", "X": "food", "Y": "food"},
        facts=(
            (
                "{A} wanted {X}.",
                "{A} asked the waiter for {X}.",
                "For {A} it had to be a plate of {X}.",
            ),
            (
                "{B} wanted {Y}.",
                "{B} asked the waiter for {Y}.",
                "For {B} it had to be a plate of {Y}.",
            ),
        ),
        bridge=(
            "{C} was not hungry and only drank some water.",
            "The waiter went away, and {C} told them about the journey.",
            "{C} laughed at both of them and lit a candle.",
        ),
        endings=(
            "At last the waiter came and put in front of {A} the {X}",
            "The waiter bowed to {A} and served {A.him} the {X}",
            "{A} tasted it and said that nowhere else had {A.he} eaten such good {X}",
        ),
    ),
    Plot(
        name="errand",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "X": "food",
            "Y": "food",
            "V": "food",
            "P": "place",
        },
        facts=(
            (
                "{B} sent {A} to the shop to buy {X}.",
                "{A} was sent out by {B} to buy {X}.",
                "We have run out of {X}, said {B} to {A}.",
            ),
            (
                "There was enough {Y} at home.",
                "{A} knew that there was plenty of {Y} in the house.",
                "Of {Y} they still had more than enough.",
            ),
            (
                "At the shop {A} bought {V} instead.",
                "But {A} came back with {V}.",
                "In the shop {A} saw {V} and forgot everything else.",
            ),
        ),
        bridge=(
            "On the way home {A.he} met friends near the {P} and stayed until dark.",
            "{A} was pleased and whistled all the way home.",
            "The bag was heavy, and {A} had to rest twice.",
        ),
        endings=(
            "{B} looked into the bag and asked what had become of the {X}",
            "You were meant to bring something else, said {B}, for I had asked for {X}",
            "{A} had to go out again, and this time {A.he} did not forget the {X}",
        ),
        shuffled=False,
    ),
    Plot(
        name="growing",
        answer="X",
        slots={"A": "name", "B": "name", "X": "trade", "Y": "trade", "P": "place"},
        facts=(
            (
                "As a child {A} wanted to become {X.a}.",
                "{A} told everybody that one day {A.he} would be {X.a}.",
                "Even when {A} was small, {A.he} dreamed of being {X.a}.",
            ),
            (
                "As a child {B} wanted to become {Y.a}.",
                "{B} told everybody that one day {B.he} would be {Y.a}.",
                "Even when {B} was small, {B.he} dreamed of being {Y.a}.",
            ),
        ),
        bridge=(
            "Their parents laughed, for who knows at that age what life will bring.",
            "They played together at the {P} and spoke of nothing else.",
            "Twenty years went by, and neither of them forgot.",
        ),
        endings=(
            "Today every child in the town knows {A} the {X}",
            "And so it came about, for {A} did indeed become {X.a}",
            "Now there is a sign over the door of {A}, and it says {X}",
        ),
    ),
    Plot(
        name="thief",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "O": "object",
            "X": "trade",
            "Y": "trade",
            "V": "trade",
        },
        facts=(
            (
                "{A} had seen the {X} climb through the window with the {O}.",
                "Late at night {A} saw the {X} run away with the {O}.",
                "It was the {X} who had taken the {O}, and {A} had watched it.",
            ),
            (
                "The {Y} had been asleep the whole night.",
                "The {Y} had been far away at the time.",
                "The {Y} could not have done it.",
            ),
            (
                "Most people thought that it was the {V}.",
                "At first {B} believed that the {V} had done it.",
                "There were ugly rumours about the {V}.",
            ),
        ),
        bridge=(
            "{B} asked {A} to tell the truth in front of everybody.",
            "{A} was afraid and kept silent for three days.",
            "In court {B} asked who the thief had been.",
        ),
        endings=(
            "{A} stood up and said that the thief was the {X}",
            "With a trembling hand {A} pointed at the {X}",
            "So the truth came out, and they arrested the {X}",
        ),
    ),
    Plot(
        name="lessons",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "C": "name",
            "X": "instrument",
            "Y": "instrument",
        },
        facts=(
            (
                "{A} was learning to play the {X}.",
                "Every day after school {A} practised the {X}.",
                "{A} took lessons on the {X}.",
            ),
            (
                "{B} was learning to play the {Y}.",
                "Every day after school {B} practised the {Y}.",
                "{B} took lessons on the {Y}.",
            ),
        ),
        bridge=(
            "{C} invited both of them to the concert in the town hall.",
            "In June there was to be a concert, and {C} sold the tickets.",
            "When the hall was full, {C} welcomed the guests.",
        ),
        endings=(
            "{A} stepped on the stage, bowed, and began to play the {X}",
            "The concert began when {A} sat down with the {X}",
            "Nobody who heard {A} that evening would ever forget the {X}",
        ),
    ),
    Plot(
        name="shop",
        answer="X",
        slots={
            "A": "name",
            "B": "name",
            "X": "instrument",
            "Y": "instrument",
            "V": "instrument",
        },
        facts=(
            (
                "In the window of the shop {A} had seen {X.a} and could not forget it.",
                "{A} had been saving money for {X.a}.",
                "More than anything {A} wished to own {X.a}.",
            ),
            (
                "{B}, who owned the shop, showed {A.him} {Y.a} first.",
                "{B}, who owned the shop, thought that {Y.a} would be easier.",
                "{B}, who owned the shop, praised {Y.a} instead.",
            ),
            (
                "There was {V.a} too, but its price was far too high.",
                "Next to the door stood {V.a} with one string missing.",
            ),
        ),
        bridge=(
            "{A} listened politely and shook {A.his} head.",
            "{A} knew very well what {A.he} had come for.",
            "{A} put all {A.his} coins on the table and would not change {A.his} mind.",
        ),
        endings=(
            "In the end {A} got what {A.he} had wished for and left with the {X}",
            "{B} smiled, took the money and let {A} choose, and {A} chose the {X}",
            "An hour later {A} was sitting at home with {A.his} very own {X}",
        ),
        shuffled=False,
    ),
    Plot(
        name="journey",
        answer="X",
        slots={"A": "name", "B": "name", "C": "name", "X": "city", "Y": "city"},
        facts=(
            (
                "{A} bought a ticket to {X}.",
                "{A} was going to {X}.",
                "The train that {A} took was bound for {X}.",
            ),
            (
                "{B} bought a ticket to {Y}.",
                "{B} was going to {Y}.",
                "The train that {B} took was bound for {Y}.",
            ),
        ),
        bridge=(
            "{C} stood on the platform and waved until both trains were gone.",
            "They said goodbye at the station, and {C} carried the bags.",
            "{C} had packed bread and apples for both of them.",
        ),
        endings=(
            "After two days {A} got off the train and was in {X}",
            "A week later {C} had a letter from {A} with a stamp from {X}",
            "When {A} woke up, the train was already standing in {X}",
        ),
    ),
    Plot(
        name="childhood",
        answer="X",
        slots={"A": "name", "B": "name", "X": "city", "Y": "city", "V": "city"},
        facts=(
            (
                "{A} had been born in {X}.",
                "The family of {A} came from {X}.",
                "{A} had spent {A.his} childhood in {X}.",
            ),
            (
                "{A.He} studied in {Y}.",
                "{A.He} went to school in {Y}.",
                "As a student {A.he} lived in {Y}.",
            ),
            (
                "Later {A.he} found work in {V}.",
                "Later {A.he} moved to {V} for {A.his} work.",
                "Later {A.he} married {B} in {V}.",
            ),
        ),
        bridge=(
            "But {A} often thought of the house where {A.he} was born.",
            "In old age {A} wanted to see {A.his} first home once more.",
            "{B} asked where {A} had been happiest, and it was in {A.his} childhood.",
        ),
        endings=(
            "So {A} sold everything and went back to where {A.he} was born, to {X}",
            "Before {A} died, {A.he} returned to the town of {A.his} childhood, {X}",
            "{A} was buried where {A.he} had been born, in {X}",
        ),
        shuffled=False,
    ),
)
