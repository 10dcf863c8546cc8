"""Hand stdin and stdout of this program over to the test that listens on the socket argv[1], and stay until it is done.

So the test holds both ends of a channel whose far end a child or an SSH server made.
"""

import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as test:
    test.connect(sys.argv[1])
    socket.send_fds(test, [b"."], [0, 1])
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    # OpenSSH reports the end of stdout only when stderr has ended too.
    os.dup2(null, 2)
    test.recv(1)
