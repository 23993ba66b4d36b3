"""Kill a stage anywhere, run it again to its end: the same files as without a kill, and no other."""

from __future__ import annotations

import fnmatch
import random
import shutil
import signal
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from counts import Row
from processes import Ended
from stages import Place, Stage, contents

PATIENCE = 60.0  # seconds in which a group ends after one of its ranks died, and a command after SIGTERM
START = {True: 0.45, False: 0.02}  # share of the usual time before the first kill; a launched group imports until then
EARLIER = (1.0, 0.7, 0.5, 0.3, 0.0)  # factors of the moment, start after start, until a kill comes before the end
FINISHED = ("is not empty", "already holds a draft")  # the job had ended before the kill: a word, no harm


def kill_anywhere(stage: Stage, n: int, place: Place, seed: int = 0) -> Row:
    """Kill a stage at ``n`` random moments and run it again each time.

    Lost: the second run fails or gives other files, the first one claimed to be complete, or ended with exit code 0
    though it was not. Left: files that a run without a kill does not leave.

    Returns:
        The counts.
    """
    dice, row, work = random.Random(f"{stage.name} {seed}"), Row("kill", stage.name), place.work("kill")
    stage.prepare(work)
    times, wanted = [], dict[str, str]()
    for _ in range(1 if stage.launcher else 3):  # the first of a fork also touches every file for the first time
        stage.prepare(work)
        begun = time.monotonic()
        ended = stage.start(work).wait(10 * PATIENCE)
        times.append(time.monotonic() - begun)
        wanted = contents(work)
        if ended.code != 0 or ended.hung:
            row.add({"lost": f"without a kill: {ended.last_words}"})
            return row
    for _ in range(n):
        row.add(_once(stage, work, dice, statistics.median(times), wanted))
    shutil.rmtree(work)
    return row


def _once(stage: Stage, work: Path, dice: random.Random, usual: float, wanted: Mapping[str, str]) -> dict[str, str]:
    """The verdicts of one kill."""
    for attempt in range(len(EARLIER)):
        stage.prepare(work)
        running = stage.start(work)
        share = dice.uniform(START[bool(stage.launcher)], 1.0) * EARLIER[attempt]
        time.sleep(share * usual)
        number = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        whom = dice.choice(("one", "one", "all", "launcher")) if stage.launcher else "all"
        if not running.alive():
            running.wait(PATIENCE)
            continue
        victims = running.ranks() if whom == "one" else [running.pid] if whom == "launcher" else running.group()
        if not victims:  # the launcher has not started them yet
            victims, whom = running.group(), "all"
        running.signal(number, [dice.choice(victims)] if whom == "one" else victims)
        first = running.wait(PATIENCE)
        where = f"{number.name} to {whom} at {share:.2f} of {usual:.1f} s"
        return _judge(stage, work, first, usual, wanted, number, where)
    return {"lost": f"no kill came before the end in {len(EARLIER)} starts"}


def _judge(
    stage: Stage, work: Path, first: Ended, usual: float, wanted: Mapping[str, str], number: int, where: str
) -> dict[str, str]:
    found, verdicts = contents(work), dict[str, str]()
    if first.code == 0 and number == signal.SIGKILL and found != wanted:
        verdicts["lost"] = f"{where}: exit code 0 of a run that was killed"
    if problem := (stage.check and stage.check(work / "out")) or _false_claim(stage, work / "out", found, wanted):
        verdicts["lost"] = f"{where}: {problem}"
    follower = (stage.again and stage.again(work / "out")) or stage
    second = follower.start(work).wait(PATIENCE + 10 * usual)
    for which, ended in (("killed", first), ("second", second)):
        if ended.has_traceback:
            verdicts["traceback"] = f"{where}, {which} run: {ended.last_words}"
        if ended.hung:
            verdicts["hang"] = f"{where}, {which} run"
    found = contents(work)
    other = sorted(name for name in wanted if found.get(name) != wanted[name])
    finished = not other and any(word in second.last_words for word in FINISHED)
    if (second.code != 0 and not finished) or other:
        verdicts["lost"] = f"{where}: {second.last_words if second.code else f'other files: {other[:3]}'}"
    if extra := sorted(found.keys() - wanted.keys()):
        verdicts["left"] = f"{where}: {extra[:3]}"
    return verdicts or {"right": where}


def _false_claim(stage: Stage, out: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """The file that claims a complete output, where the output is not."""
    if stage.claim is None or not (out / stage.claim[0]).exists():
        return None
    names = [name for name in wanted if any(fnmatch.fnmatch(name, f"out/{one}") for one in stage.claim[1])]
    other = [name for name in names if found.get(name) != wanted[name]]
    return f"{stage.claim[0]} exists without {other[0]}" if other else None
