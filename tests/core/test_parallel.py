"""Pieces of work in forked processes: all of them once, whatever their order; errors and deaths reach the parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from qdiff.errors import InputError, QdiffError
from qdiff.parallel import run_all, workers_for
from tests.waiting import wait_until


@pytest.mark.parametrize("workers", [1, 3])
def test_every_piece_is_done_once(tmp_path, workers):
    shared, done = torch.arange(8.0), []

    def work(piece: int) -> None:
        value = float((shared * piece).sum())
        with (tmp_path / str(piece)).open("x") as file:  # fails when it is there
            file.write(f"{value} {os.getpid()} {torch.get_num_threads() if workers > 1 else 1}")

    run_all(range(7), work, workers, lambda: done.append(1))
    assert len(done) == 7
    found = [(tmp_path / str(piece)).read_text().split() for piece in range(7)]
    assert [float(row[0]) for row in found] == [28.0 * piece for piece in range(7)]
    assert (str(os.getpid()) in {row[1] for row in found}) is (workers == 1)
    assert {row[2] for row in found} == {"1"}


def test_an_error_keeps_its_class_and_its_advice():
    def work(piece: int) -> None:
        raise InputError("no such layer", "look")

    with pytest.raises(InputError, match="no such layer") as caught:
        run_all([1, 2], work, 2, lambda: None)
    assert caught.value.fix == "look"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_piece(workers):
    def work(piece: int) -> None:
        if piece == 5:
            raise InputError("this layer takes no int4", "look")

    with pytest.raises(InputError) as caught:
        run_all([3, 5], work, workers, lambda: None, lambda piece: f"layer blocks.{piece}")
    assert str(caught.value) == "layer blocks.5: this layer takes no int4\n  fix: look"


def test_a_bug_names_its_piece_too():
    def work(piece: int) -> None:
        raise ZeroDivisionError("of ours")

    with pytest.raises(QdiffError, match="layer 7: a process failed:(.|\n)*ZeroDivisionError: of ours"):
        run_all([7], work, 2, lambda: None, lambda piece: f"layer {piece}")


def test_a_surprise_comes_with_its_traceback():
    def work(piece: int) -> None:
        raise ZeroDivisionError("piece")

    with pytest.raises(QdiffError, match="ZeroDivisionError: piece"):
        run_all([1], work, 2, lambda: None)


def test_a_killed_process_is_noticed():
    def work(piece: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(QdiffError, match="killed"):
        run_all([1, 2, 3], work, 2, lambda: None)


def test_as_many_processes_as_threads():
    assert workers_for(1) == 1
    assert 1 <= workers_for(1000) <= torch.get_num_threads()


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    """Else they went on with every piece, and held the lock of the run folder that they inherited."""
    parent = os.fork()
    if parent == 0:

        def work(piece: int) -> None:
            (tmp_path / f"{piece}-{os.getpid()}").touch()
            time.sleep(60)

        run_all(range(4), work, 2, lambda: None)
        os._exit(0)
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
    workers = [int(path.name.partition("-")[2]) for path in tmp_path.iterdir()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not any(_runs(worker) for worker in workers), 20, "the processes end")


def _runs(process: int) -> bool:
    """Whether a process is there and is not one that has ended and is not yet waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
