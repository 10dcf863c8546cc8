import os
import threading

from runtime.sandbox.charger import MAX_SPANS, Charger, serve

PAGE = 4096


def test_the_helper_takes_the_memory_that_is_about_to_be_written() -> None:
    charger = Charger()
    helper = threading.Thread(target=serve, args=(charger.helpers, ()))
    helper.start()
    fd = os.memfd_create("segment", os.MFD_CLOEXEC)
    try:
        charger.take(fd, [(0, PAGE), (5 * PAGE, 2 * PAGE)])
        assert os.fstat(fd).st_blocks * 512 == 3 * PAGE
        spans = [(2 * number * PAGE, PAGE) for number in range(MAX_SPANS + 10)]
        charger.take(fd, spans)
        assert os.fstat(fd).st_blocks * 512 >= len(spans) * PAGE
    finally:
        os.close(fd)
        charger._sock.close()
        helper.join(30)
        charger.close()
    assert not helper.is_alive()


def test_a_helper_that_is_gone_stops_nothing() -> None:
    charger = Charger()
    charger.started()
    fd = os.memfd_create("segment", os.MFD_CLOEXEC)
    try:
        for _ in range(2):
            charger.take(fd, [(0, PAGE)])
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)
        charger.close()
