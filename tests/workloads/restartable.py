"""Spins inside a restartable sequence (rseq(2)) until a byte is set from outside. x86-64.

Says a line, then the addresses of the byte, of the pointer to the sequence and of its description, and ``left`` at the
end; then waits for a line on stdin. The sequence starts anew whenever the kernel takes the processor away, as sequences
must.
"""

import ctypes
import mmap
import struct

ARCH_GET_FS, ARCH_PRCTL = 0x1003, 158
SIGNATURE = struct.pack("<I", 0x53053053)
# struct rseq: cpu_id_start, cpu_id, rseq_cs
RSEQ_CS_AT = 8

libc = ctypes.CDLL(None)
thread_pointer = ctypes.c_ulong()
libc.syscall(ARCH_PRCTL, ARCH_GET_FS, ctypes.byref(thread_pointer))
offset = ctypes.c_long.in_dll(libc, "__rseq_offset").value
rseq_cs = thread_pointer.value + offset + RSEQ_CS_AT

page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
base = ctypes.addressof(ctypes.c_char.from_buffer(page))
DESCRIPTOR, FLAG, CODE = base, base + 64, base + 128

entry = b"\x48\xb8" + struct.pack("<Q", rseq_cs)  # mov $rseq_cs, %rax
entry += b"\x48\xb9" + struct.pack("<Q", DESCRIPTOR)  # mov $descriptor, %rcx
entry += b"\x48\xba" + struct.pack("<Q", FLAG)  # mov $flag, %rdx
entry += b"\x48\x89\x08"  # mov %rcx, (%rax): from here on the sequence holds
body = b"\x80\x3a\x00"  # cmpb $0, (%rdx)
body += b"\x74\xfb"  # je back
after = b"\xc3" + SIGNATURE  # ret; the signature stands before the place that a disturbed sequence jumps to
again = CODE + len(entry + body + after)
jump = b"\xe9" + struct.pack("<i", CODE - (again + 5))  # jmp entry
code = entry + body + after + jump
page[128 : 128 + len(code)] = code
page[0:32] = struct.pack("<IIQQQ", 0, 0, CODE + len(entry), len(body), again)

print()
print(FLAG, rseq_cs, DESCRIPTOR, flush=True)
ctypes.CFUNCTYPE(None)(CODE)()
print("left", flush=True)
input()
