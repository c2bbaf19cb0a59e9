"""What the disk can do, without any program of interest."""

import concurrent.futures
import os
import shutil
import time

BLOCK, OBJECT, AT_ONCE, SECONDS = 8192, 4 << 20, 4, 2.0


def fsyncs_per_second(place):
    """Blocks of 8 KiB, each written over and flushed."""
    place.mkdir()
    began, count = time.monotonic(), 0
    file = os.open(place / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while time.monotonic() - began < SECONDS:
            os.pwrite(file, os.urandom(BLOCK), 0)
            os.fsync(file)
            count += 1
    finally:
        os.close(file)
        shutil.rmtree(place)
    return count / (time.monotonic() - began)


def durable_bytes_per_second(place):
    """Into two directories: files of 4 MiB, four on their way in each, all of them and their names flushed."""
    body, began = os.urandom(OBJECT), time.monotonic()

    def keep_writing(directory, lane):
        count, handle = 0, os.open(directory, os.O_RDONLY)
        while time.monotonic() - began < SECONDS:
            file = os.open(directory / f"{lane}-{count}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(file, body)
            os.fsync(file)
            os.close(file)
            os.fsync(handle)
            count += 1
        os.close(handle)
        return count

    place.mkdir()
    directories = [place / "a", place / "b"]
    for directory in directories:
        directory.mkdir()
    with concurrent.futures.ThreadPoolExecutor(2 * AT_ONCE) as pool:
        lanes = [pool.submit(keep_writing, directory, lane) for directory in directories for lane in range(AT_ONCE)]
        count = sum(lane.result() for lane in lanes)
    took = time.monotonic() - began
    shutil.rmtree(place)
    return count * OBJECT / took
