"""A tracer that is made at once and dies with its test."""

from runtime.memory.remote import Injected, close_descriptor, make_userfaultfd
from runtime.memory.tracer_thread import TracerThread


class ThreadTracer(TracerThread):
    """``runtime.memory.tracker_uffd.Tracer``."""

    def make_userfaultfd(self, pid: int) -> Injected:
        return self.run(lambda: make_userfaultfd(pid))

    def close_descriptor(self, pid: int, descriptor: int) -> None:
        self.run(lambda: close_descriptor(pid, descriptor))
