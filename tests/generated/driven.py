"""How does hypothesis choose a program that a process of its own makes and runs?

Some programs crash PyTorch itself, and making one runs it. So the process that makes the programs asks for each choice, one
number below another, and hypothesis answers from here: it sees, keeps and shrinks the choices, whatever becomes of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MARK = "torchguard-driven: "


@dataclass
class Judged:
    """What became of one program.

    Attributes:
        program: its lines; none where the process ended while they were drawn.
        kind: in the catalogue's words; ``"crash of PyTorch"`` where the process ended without a guard.
        failures: the properties that do not hold.
        script: a script of its own, where any does not.
    """

    program: tuple[str, ...] = ()
    kind: str = "crash of PyTorch"
    failures: list[str] = field(default_factory=list)
    script: str = ""


class Judge:
    """The process, started when the first program is wanted, and again after one that ends it.

    Args:
        lines: how long a program may get.
        wide: whether the parts that came later are among them.
    """

    def __init__(self, lines: int = 14, wide: bool = False) -> None:
        self._arguments = [str(lines), "wide" if wide else ""]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def judge(self, below: Callable[[int], int]) -> Judged:
        """Have one program made and run.

        Args:
            below: a number from 0 to below the one that it is given; it may raise, and the next program begins anew.
        """
        try:
            return self._judge(below)
        except BaseException:
            self.stop()  # in the middle of a program
            raise

    def _judge(self, below: Callable[[int], int]) -> Judged:
        judged = Judged()
        for message in self._messages():
            if "below" in message:
                self._tell(below(message["below"]))
            elif "program" in message:
                judged.program = tuple(message["program"])
            elif "guarded" in message:
                judged.kind = message["guarded"]
            else:
                judged.failures, judged.script = message["failures"], message["script"]
                return judged
        assert self._process is not None
        status = self._process.wait()
        self.stop()
        if judged.kind != "crash of PyTorch":
            judged.failures = [f"crash: the process ended with {status} under the guard"]
            judged.script = "\n".join(judged.program)
        return judged

    def _messages(self) -> Any:
        if self._process is None:
            tests = Path(__file__).parent.parent
            path = os.pathsep.join([str(tests), str(tests.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            )
        else:
            self._tell(0)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))

    def _tell(self, number: int) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there will be no more messages


class Asked:
    """Stands for ``random.Random`` where choices are asked for."""

    def randrange(self, below: int) -> int:
        """A number from 0 to below ``below``."""
        _say(below=below)
        return int(sys.stdin.readline())


def _say(**message: Any) -> None:
    sys.stdout.write(_MARK + json.dumps(message) + "\n")
    sys.stdout.flush()


def main(lines: int, wide: bool) -> None:
    """Make and run one program after the other; each after the first is asked for by a line."""
    import torch

    from generated.maker import make_program
    from generated.properties import failures, known
    from generated.runs import as_script

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        program = make_program(Asked(), lines, wide)
        _say(program=program)
        facts = known(program)
        _say(guarded=facts.kind)
        found = [str(failure) for failure in failures(program, facts=facts)]
        _say(failures=found, script=as_script(program, "\n".join(found)) if found else "")
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), bool(sys.argv[2]))
