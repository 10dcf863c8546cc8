"""The filter as a function of system call, machine and argument, by an interpreter of its own; and capability sets."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from runtime.errors import BadInput, MissingFeature
from runtime.seccomp import (
    CAPABILITIES,
    DEFAULT_CAPABILITIES,
    LAST_KNOWN,
    OPENED_BY,
    REFUSED,
    capability_set,
    default_profile,
)

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, REFUSE, ABSENT, KILL = "allow", "EPERM", "ENOSYS", "kill"
ANSWERS = {
    0x7FFF0000: ALLOW,
    0x00050000 | errno.EPERM: REFUSE,
    0x00050000 | errno.ENOSYS: ABSENT,
    0x80000000: KILL,
}
SECCOMP_DATA = struct.Struct("=iIQ6Q")


def answer(program: bytes, number: int, arch: int, first_argument: int = 0) -> str:
    """What the kernel would do: classic BPF over struct seccomp_data."""
    data = SECCOMP_DATA.pack(number, arch, 0, first_argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[place]
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return ANSWERS[value]
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            place += if_true if test else if_false


def number_of(name: str, machine: str) -> int:
    """As libseccomp knows it, an independent table; negative where the machine has no such call."""
    library = ctypes.CDLL("libseccomp.so.2")
    return int(library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(ARCHES[machine]), name.encode()))


@pytest.fixture(params=ARCHES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_numbers_of_the_refused_calls_are_those_that_libseccomp_knows(machine: str) -> None:
    assert {name: number_of(name, machine) for name in REFUSED[machine]} == REFUSED[machine]


def test_a_call_refused_on_one_machine_is_refused_on_the_other_where_it_has_it() -> None:
    for name in REFUSED["x86_64"].keys() ^ REFUSED["aarch64"].keys():
        assert number_of(name, "aarch64") < 0, name


def test_everything_a_capability_opens_is_refused_without_it(machine: str) -> None:
    names = {name for opened in OPENED_BY.values() for name in opened}
    assert {name for name in names if number_of(name, machine) >= 0} <= REFUSED[machine].keys()


def test_every_number_has_the_answer_of_the_table(machine: str) -> None:
    program = default_profile(machine=machine)
    absent = {"io_uring_setup", "io_uring_enter", "io_uring_register", "clone3", "memfd_secret"}
    expected = {number: ABSENT if name in absent else REFUSE for name, number in REFUSED[machine].items()}
    expected |= dict.fromkeys(range(LAST_KNOWN + 1, 1000), ABSENT)
    for number in range(1000):
        assert answer(program, number, ARCHES[machine]) == expected.get(number, ALLOW), number


@pytest.mark.parametrize(
    "name",
    ["read", "execve", "openat", "futex", "epoll_pwait2", "rseq", "ptrace", "chroot", "setuid", "landlock_add_rule"],
)
def test_what_programs_live_on_is_allowed(machine: str, name: str) -> None:
    assert answer(default_profile(machine=machine), number_of(name, machine), ARCHES[machine]) == ALLOW


def test_a_program_of_another_machine_is_killed(machine: str) -> None:
    program = default_profile(machine=machine)
    others = [0x40000003, 0x40000028, *(arch for name, arch in ARCHES.items() if name != machine)]
    assert {answer(program, 0, arch) for arch in others} == {KILL}


def test_the_numbers_of_x32_and_impossible_ones_are_absent(machine: str) -> None:
    program = default_profile(machine=machine)
    for number in (0x40000000, 0x40000000 + 59, 0x7FFFFFFF, -1):
        assert answer(program, number, ARCHES[machine]) == ABSENT


@pytest.mark.parametrize("flag", [1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)])
def test_clone_makes_threads_and_processes_but_no_namespaces(machine: str, flag: int) -> None:
    program, clone = default_profile(machine=machine), number_of("clone", machine)
    thread = 0x3D0F00  # what pthread_create asks for
    assert answer(program, clone, ARCHES[machine], thread) == ALLOW
    assert answer(program, clone, ARCHES[machine], 17) == ALLOW
    assert answer(program, clone, ARCHES[machine], thread | flag) == REFUSE
    with_admin = default_profile(frozenset({"SYS_ADMIN"}), machine=machine)
    assert answer(with_admin, clone, ARCHES[machine], thread | flag) == ALLOW


def test_sockets_that_can_not_be_dumped_are_refused(machine: str) -> None:
    program, number = default_profile(machine=machine), number_of("socket", machine)
    found = {family for family in range(64) if answer(program, number, ARCHES[machine], family) == REFUSE}
    assert found == {38, 40}


def test_a_personality_may_be_asked_for_and_stay_what_it_is(machine: str) -> None:
    program, number = default_profile(machine=machine), number_of("personality", machine)
    answers = {
        value: answer(program, number, ARCHES[machine], value)
        for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x40000)
    }
    assert answers.pop(0x40000) == REFUSE
    assert set(answers.values()) == {ALLOW}


@pytest.mark.parametrize("capability", [*OPENED_BY, "ALL"])
def test_a_capability_opens_its_calls_and_no_others(machine: str, capability: str) -> None:
    before, after = default_profile(machine=machine), default_profile(frozenset({f"cap_{capability}"}), machine=machine)
    opened = set(OPENED_BY[capability]) if capability != "ALL" else {x for names in OPENED_BY.values() for x in names}
    for name, number in REFUSED[machine].items():
        expected = ALLOW if name in opened else answer(before, number, ARCHES[machine])
        assert answer(after, number, ARCHES[machine]) == expected, name
    assert answer(after, LAST_KNOWN + 1, ARCHES[machine]) == ABSENT


def test_io_uring_stays_absent_whatever_is_opened(machine: str) -> None:
    program = default_profile(frozenset({"ALL"}), machine=machine)
    for name in ("io_uring_setup", "io_uring_enter", "io_uring_register"):
        assert answer(program, number_of(name, machine), ARCHES[machine]) == ABSENT


def test_another_machine_has_no_profile_and_an_unknown_capability_is_refused() -> None:
    with pytest.raises(MissingFeature, match="riscv64"):
        default_profile(machine="riscv64")
    with pytest.raises(BadInput, match="SYS_ADMIM"):
        default_profile(frozenset({"SYS_ADMIM"}))


# Capabilities


def names(add: list[str], drop: list[str]) -> set[str]:
    return {CAPABILITIES[number] for number in capability_set(add, drop)}


def test_the_numbers_are_the_kernels() -> None:
    numbers = {"CHOWN": 0, "KILL": 5, "NET_BIND_SERVICE": 10, "SYS_ADMIN": 21, "SETFCAP": 31, "CHECKPOINT_RESTORE": 40}
    assert {name: CAPABILITIES.index(name) for name in numbers} == numbers
    assert len(CAPABILITIES) == 41


def test_without_a_word_a_container_has_dockers_fourteen() -> None:
    assert names([], []) == DEFAULT_CAPABILITIES
    assert len(DEFAULT_CAPABILITIES) == 14


def test_capabilities_are_added_and_dropped_under_any_spelling() -> None:
    assert names(["net_admin", "CAP_SYS_TIME"], ["cap_mknod", "NET_RAW"]) == (
        DEFAULT_CAPABILITIES | {"NET_ADMIN", "SYS_TIME"}
    ) - {"MKNOD", "NET_RAW"}


def test_all_can_be_dropped_but_some_and_added_but_some() -> None:
    assert names(["CHOWN"], ["ALL"]) == {"CHOWN"}
    assert names(["all"], ["SYS_ADMIN"]) == set(CAPABILITIES) - {"SYS_ADMIN"}
    assert names([], ["ALL"]) == set()
    assert names(["ALL"], []) == set(CAPABILITIES)
    assert names(["SYS_ADMIN"], ["SYS_ADMIN"]) == DEFAULT_CAPABILITIES | {"SYS_ADMIN"}


@pytest.mark.parametrize("name", ["", "SYS", "CAP_", "cap_all_of_them", "NET ADMIN"])
def test_what_is_no_capability_is_refused(name: str) -> None:
    for add, drop in (([name], []), ([], [name])):
        with pytest.raises(BadInput, match="no capability"):
            capability_set(add, drop)
