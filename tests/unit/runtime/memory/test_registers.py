"""Register layouts. aarch64 has only these tests: it has never been run."""

import errno
import struct

import pytest

from runtime.errors import MissingFeature
from runtime.linux.registers import X86_64, Aarch64, this_architecture

MASK = (1 << 64) - 1
# struct user_regs_struct, in order.
X86_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


def x86(**values: int) -> bytes:
    return struct.pack("27Q", *(values.get(name, 1000 + index) & MASK for index, name in enumerate(X86_NAMES)))


def x86_values(registers: bytes) -> dict[str, int]:
    return dict(zip(X86_NAMES, struct.unpack("27Q", registers), strict=True))


def test_x86_calls_with_arguments_in_their_registers_and_restarts_nothing() -> None:
    machine = X86_64()
    saved = x86(orig_rax=202, rax=-516)
    calling = x86_values(machine.calling(saved, 0x7000, 323, [1, 2, 3, 4, 5, 6]))
    arguments = [calling[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9")]
    assert (calling["rax"], calling["rip"], calling["orig_rax"]) == (323, 0x7000, MASK)
    assert arguments == [1, 2, 3, 4, 5, 6]
    touched = {"rax", "rip", "orig_rax", "rdi", "rsi", "rdx", "r10", "r8", "r9"}
    assert all(value == x86_values(saved)[name] for name, value in calling.items() if name not in touched)


def test_x86_results_are_signed() -> None:
    assert X86_64().result(x86(rax=-13)) == -13
    assert X86_64().result(x86(rax=7)) == 7


def test_x86_repeats_only_a_call_that_said_eintr_and_that_the_kernel_does_not_restart() -> None:
    machine = X86_64()
    assert machine.interrupted_for_nothing(x86(orig_rax=232, rax=-errno.EINTR))
    assert not machine.interrupted_for_nothing(x86(orig_rax=232, rax=0))
    assert not machine.interrupted_for_nothing(x86(orig_rax=MASK, rax=-errno.EINTR))
    # connect goes on in the background: a second call says something else.
    assert not machine.interrupted_for_nothing(x86(orig_rax=42, rax=-errno.EINTR))
    again = x86_values(machine.calling_again(x86(orig_rax=232, rax=-errno.EINTR, rip=0x7002)))
    assert (again["rax"], again["rip"], again["orig_rax"]) == (232, 0x7000, MASK)


def test_aarch64_calls_with_its_number_in_x8() -> None:
    machine = Aarch64()
    saved = struct.pack("34Q", *range(100, 134))
    assert machine.program_counter(saved) == 132
    calling = struct.unpack("34Q", machine.calling(saved, 0x7000, 57, [5]))
    assert (calling[0], calling[8], calling[32]) == (5, 57, 0x7000)
    assert [index for index, value in enumerate(calling) if value != index + 100] == [0, 8, 32]
    assert machine.result(struct.pack("34Q", -9 & MASK, *[0] * 33)) == -9


@pytest.mark.parametrize(("machine", "size"), [("x86_64", 216), ("aarch64", 272)])
def test_sizes_are_those_of_the_kernel(machine: str, size: int) -> None:
    assert this_architecture(machine).register_bytes == size


def test_another_machine_is_refused() -> None:
    with pytest.raises(MissingFeature, match="riscv64"):
        this_architecture("riscv64")
