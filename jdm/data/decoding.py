"""Decodes images of any format and size to uint8 pixels of one shape.

Owns the steps of decoding, and the processes that decode many images at once. An image is turned
upright as its EXIF or XMP data says, converted to grey (ITU-R 601) or RGB, cropped to the square in
the middle, and resized (bicubic, with antialiasing). An alpha channel is dropped.
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
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from jdm.data import DataError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}
VERSION = 1  # of the steps above; a new number makes every split be decoded again
MANY = 2048  # images, above which processes are faster than threads, including their start
MOST = 8  # decoders at once; the one process that reads the records cannot supply more


def decode(encoded: bytes, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """The pixels of one encoded image. Raises an error of PIL, of any type, for a broken one."""
    return _to_pixels(_upright(encoded), size, channels)


def _upright(encoded: bytes) -> "Image.Image":
    """The image in its own size and mode, of 8 bits."""
    from PIL import Image, ImageOps

    image: Image.Image = Image.open(io.BytesIO(encoded))
    image.load()
    if {"exif", "xmp"} & image.info.keys():  # otherwise exif_transpose would only copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; `convert` would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image


def _to_pixels(
    image: "Image.Image", size: int, channels: int
) -> UInt8[np.ndarray, "size size channels"]:
    from PIL import Image

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
    """Why an image cannot be decoded, to any size and channels; "" where it can."""
    from PIL import UnidentifiedImageError

    try:
        image = _upright(encoded)
        for channels in MODES:  # the steps of `decode`, of which only the last depend on channels
            _to_pixels(image, 8, channels)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # PIL has no type for "broken": OSError, SyntaxError, ValueError, …
        return str(error).replace("\n", " ") or type(error).__name__
    return ""


@contextlib.contextmanager
def decoders(images: int) -> Iterator[Callable[[Iterator[tuple]], Iterator[tuple]]]:
    """Yields a function that maps `_decode_block` over blocks, in order and a few blocks ahead.

    images: the number of images in all blocks, which decides between threads and processes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, MOST)
    # Much of the time for a small image is spent in Python code, which threads run one at a time.
    here = contextlib.nullcontext(lambda block: _decode_block(*block))
    runner = _processes(count) if count > 1 and images >= MANY else here
    with runner as run, ThreadPoolExecutor(count) as pool:

        def decode_ahead(blocks):
            ahead: collections.deque = collections.deque()
            for block in blocks:
                ahead.append(pool.submit(run, block))
                if len(ahead) > 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

        yield decode_ahead


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Callable[[tuple], tuple]]:
    """Yields a function that runs `_decode_block` in one of `count` processes, for many threads.

    multiprocessing is not used: it would import the user's script again (spawn), or copy locks
    that another thread holds (fork).
    """
    code = "import sys; from jdm.data.decoding import _serve; _serve(int(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    idle: queue.SimpleQueue = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-c", code, str(theirs.fileno())]
                stack.enter_context(  # in another process group: ^C reaches the parent alone
                    subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0, env=env)
                )
            # On exit, the connection is closed, which ends the process; then Popen waits for it.
            idle.put(stack.enter_context(ours))

        def run(block):
            connection = idle.get()
            try:
                connection.send(block)
                return connection.recv()
            except (EOFError, OSError) as error:
                raise DataError("a process that decodes images was killed") from error
            finally:
                idle.put(connection)

        yield run


def _serve(handle: int) -> None:
    """Decodes the blocks that arrive over a connection, until its other end is closed."""
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        while True:
            connection.send(_decode_block(*connection.recv()))


def _decode_block(encoded: list[bytes], size: int, channels: int) -> tuple[list[bytes], str]:
    """(pixels of the images before the first broken one, why that one is broken or "")."""
    pixels = []
    for one in encoded:
        try:
            pixels.append(decode(one, size, channels).tobytes())
        except Exception as error:  # PIL has no type for "broken"
            return pixels, str(error) or type(error).__name__
    return pixels, ""
