"""One server and one browser for the tests of the page."""

import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --use-fake-device-for-media-stream
--use-fake-ui-for-media-stream --window-size=1200,900
""".split()


def start(folder: Path, *flags: str, env: dict[str, str] | None = None) -> SimpleNamespace:
    """jdm serve in an empty folder: its url, process, and folders. env: by default this one's."""
    cwd, temporary = folder / "cwd", folder / "tmp"
    cwd.mkdir()
    temporary.mkdir()
    jdm = Path(sys.executable).with_name("jdm")
    command = [jdm, "serve", "--checkpoint=digits", "--port=0", *flags]
    log = (folder / "log").open("w")
    env = {**(env or os.environ), "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=log, text=True
    )
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    if not found:
        process.kill()
        pytest.fail(f"the page did not start: {line}{(folder / 'log').read_text()}")
    return SimpleNamespace(
        url=found[0], process=process, cwd=cwd, temporary=temporary, log=folder / "log"
    )


def _stop(server: SimpleNamespace) -> int:
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(60)


@pytest.fixture(scope="session")
def hostile() -> dict[str, bytes]:
    """Files that are no picture, or none that should be decoded, by name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    def png(side: int) -> bytes:
        """A PNG whose header says side × side pixels; its data ends at once."""
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 99))

    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    return {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>document.title="x"</script></svg>',
        "text": b"%PDF-1.7 not an image",
        "empty": b"",
        "large": png(1500),
        "bomb": png(30_000),
        "cut": whole.getvalue()[:-500],
        "bytes": whole.getvalue() + bytes(9 << 20),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory, optimised):
    pytest.importorskip("gradio", reason="the page needs the extra serve")
    running = start(tmp_path_factory.mktemp("serve"), env=optimised)
    yield running
    if running.process.poll() is None:
        _stop(running)


@pytest.fixture(scope="session")
def stop():
    """Ends a server; returns its status."""
    return _stop


@pytest.fixture(scope="session")
def browser(server, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    if not BROWSER or not DRIVER:
        pytest.skip("no chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    driver.get(server.url)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def wait():
    return _wait


def _wait(condition, seconds: float = 120):
    """The first true result of a condition; fails where none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"{condition} stayed false for {seconds} s")
