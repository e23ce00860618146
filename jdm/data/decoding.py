"""Decoding: from encoded images of any kind and size to uint8 pixels of one shape.

Owns what an image goes through, and the processes that many go through at once. An image is turned
upright where its camera says how, cut to the square in its middle, brought to the asked size
(bicubic, averaging where it shrinks), and to grey (ITU-R 601) or RGB; what is transparent is taken
as it is stored.
"""

import collections
import contextlib
import io
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe

import numpy as np
from jaxtyping import UInt8

from jdm.data import DataError

MODES = {1: "L", 3: "RGB"}
VERSION = 1  # of what an image goes through: what another one decoded is decoded again
MANY = 2048  # images from which processes decode faster than threads, their start included
MOST = 8  # decoders; one process reads for all of them, and feeds no more


def decode(encoded: bytes, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """The pixels of one encoded image. Raises whatever PIL raises for a broken one."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(encoded))
    if {"exif", "xmp"} & image.info.keys():  # else this would be a copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)


def check_image(encoded: bytes) -> str:
    """Why an image cannot be decoded, in a few words; "" where it can."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except UnidentifiedImageError:
        return "no image"
    except Exception as error:  # PIL has no type for "broken": OSError, SyntaxError, ValueError, …
        return str(error).replace("\n", " ") or type(error).__name__
    return ""


@contextlib.contextmanager
def decoders(images: int) -> Iterator[Callable[[Iterator[tuple]], Iterator[tuple]]]:
    """Something that maps `_decode_block` over blocks, in order, and takes few of them ahead."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, MOST)
    # Much of the time of a small image is spent in Python, where only one thread at a time runs.
    among = (
        _processes(count)
        if count > 1 and images >= MANY
        else contextlib.nullcontext(lambda block: _decode_block(*block))
    )
    with among as run, ThreadPoolExecutor(count) as pool:

        def decode_ahead(blocks):
            ahead = collections.deque()
            for block in blocks:
                ahead.append(pool.submit(run, block))
                if len(ahead) > 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

        yield decode_ahead


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Callable[[tuple], tuple]]:
    """Runs `_decode_block` in so many processes, from as many threads.

    Not those of multiprocessing, which run the user's script once more or copy locked locks.
    """
    command = "import sys; from jdm.data.decoding import _serve; _serve(int(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    idle = queue.SimpleQueue()
    with contextlib.ExitStack() as ending:
        for _ in range(count):
            ours, theirs = Pipe()
            with theirs:
                ending.enter_context(  # waits for it; a group apart, so that ^C ends us alone
                    subprocess.Popen(
                        [sys.executable, "-c", command, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        process_group=0,
                        env=env,
                    )
                )
            idle.put(ending.enter_context(ours))  # closed first, which ends the process

        def run(block):
            connection = idle.get()
            try:
                connection.send(block)
                return connection.recv()
            except (EOFError, OSError) as error:
                raise DataError("a process that decoded images was ended from outside") from error
            finally:
                idle.put(connection)

        yield run


def _serve(handle: int) -> None:
    """Decodes the blocks that come in over a connection, until its other end is closed."""
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        while True:
            connection.send(_decode_block(*connection.recv()))


def _decode_block(encoded: list[bytes], size: int, channels: int) -> tuple[list[bytes], str]:
    """(the pixels of each image before the first that cannot be decoded, why it cannot or "")."""
    pixels = []
    for one in encoded:
        try:
            pixels.append(decode(one, size, channels).tobytes())
        except Exception as error:  # PIL has no type for "broken"
            return pixels, str(error) or type(error).__name__
    return pixels, ""
