"""Stops threads of other processes for a moment: a stand-alone program, ``python -I -S -B tracer_main.py FD``.

Whoever dies while a thread has registers that are not its own takes that thread's process along. Movers are killed, by
people and for want of memory; this process does nothing else, can hardly be killed by accident, and does not end in the
middle when its caller has gone.

FD is one end of a SOCK_SEQPACKET pair: JSON datagrams, a descriptor by SCM_RIGHTS. It ends when the other is closed.
  caller: {"op": "open", "pid"}                 make it open a userfaultfd: {"stop_ms"} + [descriptor]
          {"op": "close", "pid", "descriptor"}  make it close one of its own: {}
  answer: {"failed"}                            why not; with "left" (a number in it) where it has kept the descriptor,
                                                and + [descriptor] where there is a copy; with "stuck" where this
                                                program has to end, which alone lets go of the thread
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.errors import RuntimeFault
from runtime.linux.seqpacket import receive
from runtime.memory.remote import LeftBehind, Stuck, close_descriptor, make_userfaultfd

MAX_MESSAGE_BYTES = 4096


def main(control_fd: int) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # Without CAP_SYS_RESOURCE the score can not be lowered.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    gc.disable()
    with socket.socket(fileno=control_fd) as control:
        while data := receive(control, MAX_MESSAGE_BYTES)[0]:
            answer, descriptors = _answer(json.loads(data))
            with contextlib.suppress(BrokenPipeError):  # nobody is there to hear it
                socket.send_fds(control, [json.dumps(answer).encode()], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            if "stuck" in answer:
                return


def _answer(request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    try:
        if request["op"] == "close":
            close_descriptor(request["pid"], request["descriptor"])
            return {}, []
        injected = make_userfaultfd(request["pid"])
        return {"stop_ms": injected.stop_ms}, [injected.descriptor]
    except LeftBehind as error:
        return {"failed": str(error), "left": error.descriptor}, [] if error.ours is None else [error.ours]
    except Stuck as error:
        return {"failed": str(error), "stuck": True}, []
    except (RuntimeFault, OSError) as error:  # it may end at any moment
        return {"failed": str(error)}, []


if __name__ == "__main__":
    main(int(sys.argv[1]))
