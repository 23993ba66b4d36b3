"""Conversations that a program writes: the training data of the quickstart's tiny target.

Every task is a function from a random generator to a question and its worked answer. A prompt belongs to the held-out
set by the hash of its text alone, so that no held-out prompt can be met in training, whatever the seed or the counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspec.data.conversations import write_conversations
from deepspec.files import write_text

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
Writer = Callable[[random.Random], tuple[str, str]]

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Lena", "Omar")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets", "eggs", "cards")
BOXES = ("boxes", "bags", "baskets", "packs")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
KINDS = {
    "fruits": ("apple", "banana", "cherry", "lemon", "orange", "peach", "pear", "plum"),
    "animals": ("cat", "dog", "fox", "horse", "lion", "owl", "rabbit", "wolf"),
    "colors": ("black", "blue", "brown", "green", "purple", "red", "white", "yellow"),
    "tools": ("axe", "drill", "hammer", "knife", "ladder", "pliers", "saw", "wrench"),
    "vegetables": ("bean", "cabbage", "carrot", "leek", "onion", "pea", "potato", "spinach"),
    "instruments": ("cello", "drum", "flute", "guitar", "harp", "piano", "trumpet", "violin"),
}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo",
    "Greece": "Athens", "Poland": "Warsaw", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Ireland": "Dublin",
    "Austria": "Vienna", "Portugal": "Lisbon", "Sweden": "Stockholm", "Chile": "Santiago", "India": "New Delhi",
    "Canada": "Ottawa", "Turkey": "Ankara", "Finland": "Helsinki",
}  # fmt: skip
UNITS = {
    "hour": ("minutes", 60), "minute": ("seconds", 60), "day": ("hours", 24), "week": ("days", 7),
    "year": ("months", 12), "meter": ("centimeters", 100), "kilogram": ("grams", 1000), "dozen": ("eggs", 12),
}  # fmt: skip
VEHICLES = {"train": (60, 120), "car": (40, 90), "bus": (30, 60), "ship": (10, 30), "bicycle": (10, 20)}
OPERATIONS = {  # name: (what it returns, Python expression of x and n, the same in words)
    "add": ("{n} more than its input", "x + {n}", "adds {n} to"),
    "subtract": ("{n} less than its input", "x - {n}", "subtracts {n} from"),
    "multiply": ("{n} times its input", "x * {n}", "multiplies with {n}"),
    "remainder": ("the remainder of its input divided by {n}", "x % {n}", "divides by {n} and keeps the rest of"),
    "power": ("its input to the power of {n}", "x ** {n}", "raises to the power of {n}"),
}
FOLDS = {  # name: (what it returns, start value, update)
    "total": ("the sum of the numbers in a list", "0", "result = result + value"),
    "product": ("the product of the numbers in a list", "1", "result = result * value"),
    "largest": ("the largest number in a list", "numbers[0]", "result = max(result, value)"),
    "smallest": ("the smallest number in a list", "numbers[0]", "result = min(result, value)"),
    "count_even": ("how many numbers in a list are even", "0", "result = result + (value % 2 == 0)"),
    "count_odd": ("how many numbers in a list are odd", "0", "result = result + (value % 2 == 1)"),
}
HEROES = {"fox": "clever", "owl": "wise", "rabbit": "quick", "bear": "strong", "mouse": "small", "wolf": "lonely"}
PLACES = {"forest": "under an old oak", "village": "beside the mill", "harbor": "near the lighthouse",
          "mountain": "in a deep cave", "garden": "behind the roses", "desert": "between the dunes"}  # fmt: skip
FINDS = {"lamp": "shone in the dark", "key": "opened every door", "map": "showed a hidden path",
         "bell": "rang without a sound", "book": "told its own story", "seed": "grew in one night"}  # fmt: skip
FRIENDS = ("hedgehog", "sparrow", "turtle", "squirrel", "frog", "deer")


def shopping(rng: random.Random) -> tuple[str, str]:
    """A two-step word problem: so many at first, then so many boxes of so many."""
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    have, count, each = rng.randint(2, 20), rng.randint(2, 6), rng.randint(2, 9)
    more = count * each
    question = f"{name} has {have} {thing}. {name} buys {count} {box} with {each} {thing} each. "
    question += rng.choice((f"How many {thing} does {name} have now?", f"How many {thing} are there in total?"))
    answer = f"{name} starts with {have} {thing}.\n"
    answer += f"{count} {box} with {each} {thing} each are {count} * {each} = {more} {thing}.\n"
    return question, answer + f"In total: {have} + {more} = {have + more}.\nThe answer is {have + more} {thing}."


def giving(rng: random.Random) -> tuple[str, str]:
    """A two-step word problem: some given away, the rest shared out evenly."""
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    share, people, given = rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 9)
    rest = share * people
    question = f"{name} has {rest + given} {thing} and gives {given} of them to {friend}. "
    question += f"The rest is shared by {people} children. How many {thing} does each child get?"
    answer = f"{name} gives away {given} {thing}, so {rest + given} - {given} = {rest} {thing} are left.\n"
    answer += f"Shared by {people} children: {rest} / {people} = {share}.\nThe answer is {share} {thing}."
    return question, answer


def rate(rng: random.Random) -> tuple[str, str]:
    """Distance from speed and time, or time from distance and speed."""
    vehicle = rng.choice(tuple(VEHICLES))
    low, high = VEHICLES[vehicle]
    speed, hours = 10 * rng.randint(low // 10, high // 10), rng.randint(2, 9)
    way = speed * hours
    if rng.random() < 0.5:
        question = f"A {vehicle} travels at {speed} km per hour. How far does it travel in {hours} hours?"
        answer = "Distance is speed times time.\n"
        return question, answer + f"The {vehicle} travels {speed} * {hours} = {way} km.\nThe answer is {way} km."
    question = f"A {vehicle} travels at {speed} km per hour. How long does it take to travel {way} km?"
    answer = "Time is distance divided by speed.\n"
    return question, answer + f"The {vehicle} needs {way} / {speed} = {hours} hours.\nThe answer is {hours} hours."


def equation(rng: random.Random) -> tuple[str, str]:
    """A linear equation, solved in two steps."""
    unknown, factor, root, shift = rng.choice("xyz"), rng.randint(2, 9), rng.randint(1, 12), rng.randint(1, 20)
    sign, inverse = rng.choice((("+", "-"), ("-", "+")))
    left = factor * root
    right = left + shift if sign == "+" else left - shift
    question = rng.choice(("Solve {}.", "Solve the equation {}.", "Find {u} if {}.")).format(
        f"{factor}{unknown} {sign} {shift} = {right}", u=unknown
    )
    step = "Subtract" if sign == "+" else "Add"
    answer = f"{step} {shift} on both sides: {factor}{unknown} = {right} {inverse} {shift} = {left}.\n"
    answer += f"Divide both sides by {factor}: {unknown} = {left} / {factor} = {root}.\n"
    return question, answer + f"The answer is {unknown} = {root}."


def convert(rng: random.Random) -> tuple[str, str]:
    """A conversion of units."""
    unit = rng.choice(tuple(UNITS))
    small, size = UNITS[unit]
    count = rng.randint(2, 12)
    many = unit if unit == "dozen" else f"{unit}s"
    question = rng.choice((f"How many {small} are {count} {many}?", f"Convert {count} {many} to {small}."))
    answer = f"One {unit} has {size} {small}.\nSo {count} {many} are {count} * {size} = {count * size} {small}."
    return question, answer


def function(rng: random.Random) -> tuple[str, str]:
    """A Python function of one number."""
    name, n = rng.choice(tuple(OPERATIONS)), rng.randint(2, 20)
    meaning, expression, words = (part.format(n=n) for part in OPERATIONS[name])
    question = rng.choice(("Write a Python function that returns {}.", "Write a function in Python. It returns {}."))
    answer = f"```python\ndef {name}_{n}(x):\n    return {expression}\n```\nThe function {name}_{n} {words} its input."
    return question.format(meaning), answer


def fold(rng: random.Random) -> tuple[str, str]:
    """A Python function with a loop over a list."""
    name = rng.choice(tuple(FOLDS))
    meaning, start, update = FOLDS[name]
    values, caller = rng.choice(("numbers", "values", "items", "scores")), rng.choice(NAMES)
    asks = (f"Write a Python function that returns {meaning}. Call the list {values}.",
            f"{caller} needs a Python function that returns {meaning}. Name the list {values}.")  # fmt: skip
    question, start = rng.choice(asks), start.replace("numbers", values)
    answer = f"```python\ndef {name}({values}):\n    result = {start}\n    for value in {values}:\n        {update}\n"
    answer += f"    return result\n```\nThe function {name} goes through {values} once and returns {meaning}."
    return question, answer


def fact(rng: random.Random) -> tuple[str, str]:
    """Two capitals at once, so that there are more questions than countries."""
    first, second = rng.sample(tuple(CAPITALS), 2)
    asks = (f"What are the capitals of {first} and {second}?", f"Name the capitals of {first} and {second}.")
    answer = f"The capital of {first} is {CAPITALS[first]}.\nThe capital of {second} is {CAPITALS[second]}."
    return rng.choice(asks), answer


def story(rng: random.Random) -> tuple[str, str]:
    """A short story with free choices in it: here the target's distribution is broad."""
    hero, place, find, friend = (rng.choice(tuple(table)) for table in (HEROES, PLACES, FINDS, FRIENDS))
    tells = ("Tell me a short story about", "Write a short story about", "Please tell a story about")
    question = f"{rng.choice(tells)} a {hero}, a {find} and a {place}."
    openings = (f"Once upon a time a {HEROES[hero]} {hero} lived in a {place}.",
                f"Long ago there was a {HEROES[hero]} {hero} who lived in a {place}.")  # fmt: skip
    lines = (
        rng.choice(openings),
        f"One {rng.choice(('morning', 'evening', 'night'))} the {hero} found a {find} {PLACES[place]}.",
        f"The {find} {FINDS[find]}.",
        rng.choice((f"The {hero} showed the {find} to a {friend}.", f"A {friend} saw the {find} and smiled.")),
        f"From that day on the {hero} and the {friend} were {rng.choice(('the best of friends', 'never alone'))}.",
    )
    return question, " ".join(lines)


def listing(rng: random.Random) -> tuple[str, str]:
    """So many members of a kind, sometimes in alphabetical order."""
    kind, count = rng.choice(tuple(KINDS)), rng.randint(2, 5)
    picked = rng.sample(KINDS[kind], count)
    if rng.random() < 0.5:
        question = f"Sort these {kind} by name: {', '.join(picked)}."
        picked, opening = sorted(picked), f"Here are the {COUNTS[count]} {kind} in alphabetical order:"
    else:
        question = f"Name {COUNTS[count]} {kind}."
        opening = f"Here are {COUNTS[count]} {kind}:"
    return question, "\n".join((opening, *(f"{number}. {item}" for number, item in enumerate(picked, 1))))


TASKS: dict[str, Writer] = {
    task.__name__: task
    for task in (shopping, giving, rate, equation, convert, function, fold, fact, story, listing)
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One question and its answer, with the name of the task that wrote it."""

    task: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the form of chat messages."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out tenth, decided by its text alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def conversations(seed: int, held_out: bool = False) -> Iterator[Conversation]:
    """Endless conversations, task after task, on one side of the split."""
    rng = random.Random(f"deepspec quickstart {seed}")
    names = list(TASKS)
    while True:
        rng.shuffle(names)
        for name in names:
            while True:
                question, answer = TASKS[name](rng)
                opening = rng.choice(("", "", "Please help. ", "Hello! ", f"{rng.choice(NAMES)} asks: "))
                if is_held_out(opening + question) == held_out:
                    break
            yield Conversation(name, opening + question, answer)


def distinct(seed: int, count: int, held_out: bool = False) -> list[Conversation]:
    """``count`` conversations whose questions all differ."""
    found: dict[str, Conversation] = {}
    for conversation in conversations(seed, held_out):
        if len(found) == count:
            break
        found.setdefault(conversation.question, conversation)
    return list(found.values())


def write_prompts(folder: Path, train: int, held_out: int, seed: int = 1) -> None:
    """Write ``train`` and ``held_out`` different prompts; the manifest of the training file is written last.

    ``held_out.jsonl`` has the form of an evaluation task: a row ``{"id", "turns": [prompt]}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tests = [{"id": f"{row.task}-{i}", "turns": [row.question]} for i, row in enumerate(distinct(seed, held_out, True))]
    write_text(folder / HELD_OUT, "".join(json.dumps(test) + "\n" for test in tests))
    rows = ({"id": f"{row.task}-{i}", "messages": row.messages()[:1]} for i, row in enumerate(distinct(seed, train)))
    write_conversations(folder / TRAIN, rows, {"generator": "deepspec.demos.quickstart.text", "seed": seed})
    log.info("prompts: %d to train on, %d held out", train, held_out)
