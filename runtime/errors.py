"""Errors of this package.

RuntimeFault            what went wrong; ``hint`` says what to do next
  BadInput              the request itself is wrong
  NotFound              no such container
  NameTaken             a container of that name or id exists
  WrongState            the container is not in a state that allows this
  Busy                  another command holds the container
  MissingFeature        kernel, CRIU or host lacks something that is needed
  KernelCallFailed      a system call failed (see linux/calls.py)
  ProgramFailed         a program we ran failed; its stderr is in the text
  NoRoom                disk, memory or an address range is full
  ReadOnly              a directory that we need can not be written
  CorruptData           data on disk or from a peer does not check out
  CriuFailed            CRIU refused or failed; carries the decisive lines of its log
"""

from __future__ import annotations


class RuntimeFault(Exception):
    """Base of every error this package raises on purpose. ``str()`` is one line for an operator."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class BadInput(RuntimeFault):
    pass


class NotFound(RuntimeFault):
    pass


class NameTaken(RuntimeFault):
    pass


class WrongState(RuntimeFault):
    pass


class Busy(RuntimeFault):
    pass


class MissingFeature(RuntimeFault):
    pass


class ProgramFailed(RuntimeFault):
    pass


class NoRoom(RuntimeFault):
    pass


class ReadOnly(RuntimeFault):
    pass


class CorruptData(RuntimeFault):
    pass


class CriuFailed(RuntimeFault):
    """``log_lines`` are the decisive lines of CRIU's log, first cause first."""

    def __init__(self, what: str, *, hint: str = "", log_lines: tuple[str, ...] = ()) -> None:
        super().__init__(what, hint=hint)
        self.log_lines = log_lines


class KernelCallFailed(RuntimeFault):
    """A system call failed; ``errno`` is its error number."""

    def __init__(self, call: str, target: str, errno: int, *, hint: str = "") -> None:
        from errno import errorcode
        from os import strerror

        super().__init__(f"{call} {target}: {strerror(errno)} ({errorcode.get(errno, errno)})", hint=hint)
        self.call = call
        self.errno = errno
