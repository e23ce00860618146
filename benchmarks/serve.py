"""How fast the page of jdm serve answers, and whether it stays up and in memory.

    python benchmarks/serve.py --checkpoint=digits --out=serve.json
    python benchmarks/serve.py --checkpoint=digits --screenshots=docs/pictures

Protocol: jdm serve is started as a process of its own, and asked as a browser asks it, through
Gradio's client. Generate: four images of four classes, all defaults, --repeats times after one that
is not counted; the time until the images are there, and until the first estimate of them is.
Visitors: --requests requests by --clients clients at once, in turn a generation of four images, a
classification of an uploaded picture, and a refused one; every 25th is an explanation with one
noise. The memory is the resident set of the server, after --settled requests and at the end.

With --screenshots nothing is measured: the pictures of docs/serve.md are taken in headless Chromium
(Debian: chromium, chromium-driver; pip install selenium), at the width of a desktop and a phone.
"""

import argparse
import base64
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

# (tab, width in CSS pixels) of each picture
PICTURES = {
    "serve-generate": ("generate", 1100),
    "serve-classify": ("classify", 1100),
    "serve-explain": ("explain", 1100),
    "serve-generate-phone": ("generate", 390),
}
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1
""".split()


def start(checkpoint: str) -> tuple[subprocess.Popen, str]:
    """(the process of jdm serve, the address of the page)."""
    jdm = Path(sys.executable).with_name("jdm")
    command = [jdm, "serve", f"--checkpoint={checkpoint}", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not (found := re.search(r"http://[\w.:]+/", line)):
        raise SystemExit(f"the page did not start: {line}")
    return process, found[0]


def memory(process: subprocess.Popen) -> int:
    """Bytes of the resident set."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def connected(url: str):
    from gradio_client import Client

    return Client(url, verbose=False, download_files=False)


def generation(client) -> tuple[float, float]:
    """(seconds until the first estimate of four digits, until their images)."""
    began, first = time.perf_counter(), None
    job = client.submit(-2, "0-3", "pixel", 6.0, "ancestral", 20, api_name="/generate")
    for outputs in job:
        if first is None and "<img" in outputs[1]:
            first = time.perf_counter() - began
    assert "4 images in" in job.result()[0], job.result()[0]
    return first, time.perf_counter() - began


def picture(seed: int) -> str:
    """A picture as a browser sends it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def request(clients: list, number: int) -> str:
    """One of the mixed requests; returns its kind."""
    client = clients[number % len(clients)]
    sent = json.dumps({"picture": picture(number), "region": ""})
    if number % 25 == 24:
        given = (sent, number % 10, "0", 1, 0.9)
        found, kind = client.predict(*given, api_name="/explain")[0], "explain"
        assert "not foreseen" not in found, found
    elif number % 3 == 0:
        found, kind = generation(client), "generate"
    elif number % 3 == 1:
        found, kind = client.predict(sent, api_name="/classify"), "classify"
        assert "jdm-bars" in found, found
    else:
        wrong = json.dumps({"picture": "data:;base64,PHN2Zz4="})
        found, kind = client.predict(wrong, api_name="/classify"), "refused"
        assert "SVG" in found, found
    return kind


def measure(arguments: argparse.Namespace) -> dict:
    process, url = start(arguments.checkpoint)
    try:
        client = connected(url)
        generation(client)
        times = [generation(client) for _ in range(arguments.repeats)]
        clients = [connected(url) for _ in range(arguments.clients)]
        resident, done, lock = {}, [], threading.Lock()

        def visit(number: int) -> None:
            began, kind = time.perf_counter(), request(clients, number)
            with lock:
                done.append((kind, time.perf_counter() - began))
                if len(done) == arguments.settled:
                    resident["settled"] = memory(process)

        began = time.perf_counter()
        with ThreadPoolExecutor(arguments.clients) as pool:
            list(pool.map(visit, range(arguments.requests)))
        took, resident["end"] = time.perf_counter() - began, memory(process)
        assert process.poll() is None, "the server ended"
        waits = {kind: [t for k, t in done if k == kind] for kind, _ in done}
        return {
            "checkpoint": arguments.checkpoint,
            "generate_seconds": statistics.median(t for _, t in times),
            "first_preview_seconds": statistics.median(t for t, _ in times),
            "requests": len(done),
            "clients": arguments.clients,
            "requests_seconds": took,
            "median_seconds": {kind: statistics.median(found) for kind, found in waits.items()},
            "memory_settled_bytes": resident["settled"],
            "memory_end_bytes": resident["end"],
            "memory_growth": resident["end"] / resident["settled"] - 1,
        }
    finally:
        process.terminate()
        process.wait(60)


def printed(found: dict) -> str:
    """The figures as a table in Markdown."""
    mib = 2**20
    rows = [
        ("Generate, four images, warm", f"{found['generate_seconds']:.2f} s"),
        ("first estimate of them", f"{found['first_preview_seconds']:.2f} s"),
        (
            f"{found['requests']} mixed requests of {found['clients']} clients",
            f"{found['requests_seconds']:.0f} s",
        ),
        ("memory once settled", f"{found['memory_settled_bytes'] / mib:.0f} MiB"),
        (
            "memory at the end",
            f"{found['memory_end_bytes'] / mib:.0f} MiB ({found['memory_growth']:+.1%})",
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


# Pictures of the page -----------------------------------------------------------------------------


def screenshots(arguments: argparse.Namespace) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    folder = Path(arguments.screenshots)
    process, url = start(arguments.checkpoint)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        wait = WebDriverWait(driver, 600)

        def click(css: str) -> None:
            driver.execute_script("document.querySelector(arguments[0]).click()", css)

        def seen(css: str, text: str):
            found = driver.execute_script(
                "return document.querySelector(arguments[0])?.textContent || ''", css
            )
            return text in found

        def open_tab(name: str) -> None:
            driver.execute_script(
                "[...document.querySelectorAll('button[role=tab]')].find(e => "
                "e.textContent.trim().toLowerCase() == arguments[0]).click()",
                name,
            )
            time.sleep(0.5)

        try:
            driver.get(url)
            wait.until(lambda _: driver.find_elements("css selector", "#generate"))
            click("#generate")
            wait.until(lambda _: seen("body", "4 images in"))
            open_tab("classify")
            click("#classify-pad .pad-examples button:nth-child(4)")
            wait.until(lambda _: driver.find_elements("css selector", "#probabilities .jdm-bars"))
            open_tab("explain")
            click("#explain-pad .pad-examples button:nth-child(6)")
            target = driver.find_element("css selector", "#target input")
            target.click()
            target.send_keys(Keys.CONTROL, "a")
            target.send_keys("3" + Keys.ENTER)
            click("#explain")
            wait.until(lambda _: seen("#explain-status", "robability of"))
            ActionChains(driver).send_keys(Keys.ESCAPE).perform()
            for name, (tab, width) in PICTURES.items():
                size = dict(width=width, height=760, mobile=width < 500, deviceScaleFactor=1)
                command = "Emulation.setDeviceMetricsOverride"
                driver.execute_cdp_cmd(command, size)
                open_tab(tab)
                driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
                whole = driver.execute_script("return document.body.scrollHeight")
                size["height"] = min(max(whole, 400), 1400)
                driver.execute_cdp_cmd(command, size)
                time.sleep(0.5)
                path = folder / f"{name}.png"
                path.write_bytes(driver.get_screenshot_as_png())
                print(f"wrote {path}")
        finally:
            driver.quit()
            process.terminate()
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="digits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--settled", type=int, default=50)
    parser.add_argument("--out", help="a file for the figures, as JSON")
    parser.add_argument("--screenshots", help="a folder for pictures of the page")
    arguments = parser.parse_args()
    if arguments.screenshots:
        screenshots(arguments)
        return
    found = measure(arguments)
    print(printed(found))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
