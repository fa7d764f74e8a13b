"""Runs that are killed, and runs that share one folder."""

import os
import random
import signal

import kills
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def test_five_kills_damage_nothing_and_the_set_is_completed(tmp_path):
    draw = random.Random()
    for number in [signal.SIGKILL, signal.SIGINT] * 2 + [signal.SIGKILL]:
        kills.kill(tmp_path, number, draw)
    kills.finish(tmp_path)


def test_processes_in_one_folder_neither_overwrite_nor_lose(tmp_path):
    """Two runs make the same images; the first to save one continues. A third makes others."""
    other = [*kills.LINE[:-3], "1001", *kills.LINE[-2:]]
    children = [kills.start(tmp_path, *line) for line in (kills.LINE, kills.LINE, other)]
    outs = [child.communicate(timeout=120) for child in children]
    codes = [child.returncode for child in children]
    assert codes[2] == 0 and 0 in codes[:2] and set(codes) <= {0, 5}, outs
    assert all("exists" in err for (_, err), code in zip(outs, codes) if code)
    made = [kills.reported(out)[False] for out, _ in outs]
    assert sum(map(len, made)) == len(set.union(*made)) == len(kills.whole(tmp_path))
    assert len(made[2]) == kills.COUNT and kills.leftovers(tmp_path) == []
