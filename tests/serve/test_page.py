"""The page as a visitor uses it: in headless Chromium, on one server with the packaged digits."""

import base64
import concurrent.futures
import importlib.util
import io
import json

import numpy as np
import pytest
from PIL import Image

import jdm

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"), reason="the page needs the extra serve"
)

# Of the page; with four images, one program serves all requests.
DEFAULT = "representation", 0.7, "ancestral"


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver, server, wait):
        self.driver, self.server, self.wait = driver, server, wait

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        return self.wait(lambda: [e for e in self.all(css) if e.is_displayed()])[0]

    def tab(self, name):
        tabs = self.wait(lambda: [e for e in self.all("button[role=tab]") if e.text == name])
        tabs[0].click()
        self.wait(lambda: tabs[0].get_attribute("aria-selected") == "true")

    def type(self, css, text):
        from selenium.webdriver.common.keys import Keys

        element = self.one(css)
        element.click()
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(text)
        return element

    def text(self, css):
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent)"
            ".map(e => e.innerText).join(' ').trim()",
            css,
        )

    def sources(self, css):
        """The addresses of pictures, displayed or not."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.src)", css)

    def pictures(self, css):
        """The pixels of the pictures that are displayed, [H, W, C] each."""
        found = []
        for source in self.js(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent &&"
            " e.complete && e.naturalWidth).map(e => e.src)",
            css,
        ):
            content = base64.b64decode(source.partition(",")[2])
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            found.append(pixels[..., None] if pixels.ndim == 2 else pixels)
        return found


@pytest.fixture(scope="module")
def page(browser, server, wait):
    page = Page(browser, server, wait)
    page.one("#generate")
    return page


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server.url, verbose=False, download_files=False)


def test_generate_shows_the_images_of_jdm_sample_and_how_they_emerge(page, wait):
    from selenium.webdriver.common.keys import Keys

    page.tab("Generate")
    page.type("#class input", "3" + Keys.ENTER)
    page.type("#seeds textarea, #seeds input", "5-8")
    page.js(
        "window.seen=[]; new MutationObserver(() => window.seen.push("
        "document.querySelector('#images img')?.src)).observe("
        "document.querySelector('#images'), {subtree: true, childList: true, attributes: true})"
    )
    page.one("#generate").click()
    wait(lambda: "4 images in" in page.text(".jdm-status"))
    images = page.pictures("#images img")
    expected = jdm.sample("digits", labels=[3], seeds=range(5, 9))
    np.testing.assert_array_equal(np.stack(images), expected.images)
    assert len(set(page.js("return window.seen"))) > 3  # estimates, before the images
    captions = [e.text for e in page.all("#images figcaption")]
    assert [caption.split(" ")[0] for caption in captions] == ["3"] * 4
    assert "(seed 5)" in captions[0] and "%" in captions[0]


def test_what_was_generated_can_be_downloaded(page):
    links = page.all("a[download]")
    assert {e.get_attribute("download").split(".")[-1] for e in links} == {"png", "gif", "npz"}
    content = {
        e.get_attribute("download"): base64.b64decode(e.get_attribute("href").partition(",")[2])
        for e in links
    }
    arrays = np.load(io.BytesIO(content["samples.npz"]))
    assert arrays["seeds"].tolist() == [5, 6, 7, 8]
    np.testing.assert_array_equal(arrays["arr_0"], np.stack(page.pictures("#images img")))
    assert Image.open(io.BytesIO(content["samples.gif"])).n_frames > 3


def test_stop_ends_the_work(page, wait):
    from selenium.webdriver.common.keys import Keys

    page.tab("Generate")
    page.type("#seeds textarea, #seeds input", "0-3")
    page.js("document.querySelectorAll('.label-wrap:not(.open)').forEach(e => e.click())")
    steps = page.one("#steps input[type=number]")
    steps.send_keys(Keys.CONTROL, "a")
    steps.send_keys("250", Keys.TAB)
    page.js(  # in the page, where the step cannot pass before the click
        "const watch = new MutationObserver(() => {"
        "if (![...document.querySelectorAll('.jdm-status')].some("
        "e => e.offsetParent && e.textContent.includes('Step '))) return;"
        "watch.disconnect(); document.querySelector('#generate-stop').click() });"
        "watch.observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    page.one("#generate").click()
    wait(lambda: "Stopped." in page.text(".jdm-status"))
    before = page.sources("#images img")
    assert "4 images in" not in page.text(".jdm-status")
    page.tab("Classify")
    page.all("#classify-pad .pad-examples button")[0].click()
    wait(lambda: page.text("#probabilities .jdm-bars"))  # the model is free again
    assert page.sources("#images img") == before
    page.tab("Generate")
    assert "Stopped." in page.text(".jdm-status")  # no update that was on its way has replaced it


def test_what_waits_for_its_turn_says_so_and_can_be_stopped(page, client, wait):
    before = page.sources("#images img")
    other = client.submit(3, "0-3", *DEFAULT, 250, api_name="/generate")
    page.tab("Generate")
    wait(lambda: other.outputs())  # the model computes
    page.one("#generate").click()
    wait(lambda: "Waiting" in page.text(".jdm-status"))
    page.one("#generate-stop").click()
    wait(lambda: "Stopped." in page.text(".jdm-status"))
    assert not other.done()
    other.cancel()
    assert page.sources("#images img") == before


def test_wrong_seeds_are_one_sentence(page, wait):
    page.tab("Generate")
    page.type("#seeds textarea, #seeds input", "<b>4-1</b>")
    page.one("#generate").click()
    said = wait(lambda: page.text(".jdm-error"))
    assert said.startswith("Seeds='<b>4-1</b>' is not a list of whole numbers")
    page.type("#seeds textarea, #seeds input", "0-3")


def shown(page):
    """{class: probability in percent} of the tab Classify."""
    return {
        row.find_element("css selector", "th").text: float(row.text.split()[-1].rstrip("%"))
        for row in page.all("#probabilities .jdm-bars tr")
    }


def test_classify_an_example_a_file_a_drawing_and_a_photograph(page, tmp_path, wait):
    from selenium.webdriver.common.action_chains import ActionChains

    page.tab("Classify")
    clear = page.one("#classify-pad [data-do=clear]")
    clear.click()
    wait(lambda: not page.all("#probabilities .jdm-bars"))
    page.all("#classify-pad .pad-examples button")[3].click()
    wait(lambda: page.all("#probabilities .jdm-bars"))
    found = shown(page)
    assert max(found, key=found.get) == "3" and len(found) == 10
    assert 99 < sum(found.values()) < 101
    assert "expected calibration error" in page.text(".jdm-status")

    digit = jdm.sample("digits", labels=[3], seeds=range(5, 9)).images[0]
    file = tmp_path / "three.png"
    Image.fromarray(digit[..., 0]).resize((80, 80), Image.Resampling.NEAREST).save(file)
    clear.click()
    wait(lambda: not page.all("#probabilities .jdm-bars"))
    page.js("document.querySelector('#classify-pad input[type=file]').hidden = false")
    page.one("#classify-pad input[type=file]").send_keys(str(file))
    wait(lambda: page.all("#probabilities .jdm-bars"))
    expected = jdm.classify("digits", digit[None], names=True)[0]
    found = shown(page)
    for name, value in expected.items():
        assert abs(found[name] - 100 * value) < 5
    assert "8 × 8 pixels" in page.text("#classify-pad .pad-note")

    clear.click()
    wait(lambda: not page.all("#probabilities .jdm-bars"))
    marks = page.one("#classify-pad .pad-marks")
    stroke = ActionChains(page.driver, duration=20).move_to_element_with_offset(marks, 0, -100)
    stroke.click_and_hold().move_by_offset(0, 100).move_by_offset(0, 100).release().perform()
    wait(lambda: page.all("#probabilities .jdm-bars"))
    (sees,) = page.pictures("#probabilities figure img")
    assert sees.shape == (8, 8, 1)
    assert sees[2:6, 3:5].min() > 60 and sees[:, [0, 7]].max() < 60  # a stroke down the middle

    clear.click()
    wait(lambda: not page.all("#probabilities .jdm-bars"))
    page.one("#classify-pad [data-do=camera]").click()
    page.one("#classify-pad [data-do=snap]").click()
    wait(lambda: page.all("#probabilities .jdm-bars"))


def test_hostile_files_are_refused_by_one_sentence(page, hostile, tmp_path, wait):
    page.tab("Classify")
    page.one("#classify-pad [data-do=clear]").click()
    page.js("document.querySelector('#classify-pad input[type=file]').hidden = false")
    for name, content, said in (
        ("huge.png", hostile["bytes"], "at most 8 MB are taken"),
        ("text.png", hostile["text"], "The picture is not an image; PNG"),
        ("bomb.png", hostile["bomb"], "at most 24 million are taken."),
        ("script.svg", hostile["svg"], "The picture is an SVG drawing; PNG"),
    ):
        (tmp_path / name).write_bytes(content)
        page.one("#classify-pad input[type=file]").send_keys(str(tmp_path / name))
        note = wait(
            lambda said=said: said in (text := page.text("#classify-pad .pad-note")) and text
        )
        assert note.count(". ") == 0 and "Traceback" not in note
    assert not page.all("#probabilities .jdm-bars")
    page.one("#classify-pad [data-do=clear]").click()


def test_explain_shows_before_after_and_the_change_by_strength(page, wait):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.tab("Explain")
    page.all("#explain-pad .pad-examples button")[0].click()
    marks = page.one("#explain-pad .pad-marks")
    page.js("document.querySelector('#explain-pad .pad-size').value = 30")
    stroke = ActionChains(page.driver, duration=20).move_to_element_with_offset(marks, 0, -120)
    stroke.click_and_hold().move_by_offset(0, 240).release().perform()
    wait(lambda: "Only the marked region" in page.text("#explain-pad .pad-note"))
    page.type("#target input", "4" + Keys.ENTER)  # is reached at a small strength
    page.one("#explain").click()
    wait(lambda: page.text("#explain-status").startswith(("Probability of 4", "No counter")), 400)
    assert page.text("#explain-status").startswith("Probability of 4")
    before, after, change = page.pictures("#explanation img")
    assert before.shape == after.shape == (8, 8, 1) and change.shape == (8, 8, 3)
    moved = (before != after)[..., 0]
    assert moved.any() and not moved[:, [0, 7]].any()  # outside of the region nothing changes
    slider = page.one("#explanation input[type=range]")
    slider.send_keys(Keys.HOME)
    same = page.pictures("#explanation img")
    np.testing.assert_array_equal(same[0], same[1])
    slider.send_keys(Keys.END)
    np.testing.assert_array_equal(page.pictures("#explanation img")[1], after)


def test_about_says_what_the_model_is_and_what_was_measured(page):
    page.tab("About")
    text = page.text(".jdm-about")
    for said in ("digits, step 2400", "8 × 8, grey", "train 1,257", "accuracy", "360 test images"):
        assert said in text
    page.one(".jdm-about summary").click()
    assert '"prediction": "x0"' in page.text(".jdm-about pre")


def test_the_keyboard_alone_is_enough(page, wait):
    """From the top of the page: to the tab Classify, to an example, to its probabilities."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused(css):
        return page.js("return document.activeElement.matches(arguments[0])", css)

    def tab_to(css):
        for _ in range(40):
            press(Keys.TAB)
            if focused(css):
                return
        pytest.fail(f"the Tab key does not lead to {css}")

    page.tab("Generate")
    page.js("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.driver.find_element("css selector", "body").send_keys("")
    tab_to("button[role=tab]")
    for _ in range(6):
        if page.js("return document.activeElement.textContent.trim()") == "Classify":
            break
        press(Keys.TAB if not focused("[aria-selected=true]") else Keys.ARROW_RIGHT)
    press(Keys.ENTER)
    page.one("#classify-pad .pad-marks")
    page.js("document.querySelector('#classify-pad [data-do=clear]').click()")
    tab_to("#classify-pad .pad-marks")
    press(Keys.SPACE)
    wait(lambda: page.all("#probabilities .jdm-bars"))
    tab_to("#classify-pad .pad-examples button")
    press(Keys.ENTER)
    wait(lambda: shown(page).get("0", 0) > 50)
    tab_to("#classify")


def test_a_phone_needs_no_sideways_scrolling(page, wait):
    phone = dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for name in ("Generate", "Classify", "Explain", "About"):
            page.tab(name)
            wait(lambda: page.js("return document.documentElement.scrollWidth") <= 390, 10)
            wide = page.js(
                "return [...document.querySelectorAll('button, img, input, canvas, table')]"
                ".filter(e => e.offsetParent && e.getBoundingClientRect().right > 391)"
                ".map(e => e.outerHTML.slice(0, 200))"
            )
            assert not wide
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_visitors_at_the_same_time_get_their_own_results(server, client):
    from gradio_client import Client

    def visit(k: int) -> str:
        own = Client(server.url, verbose=False, download_files=False)
        return own.predict(k, f"{4 * k}-{4 * k + 3}", *DEFAULT, 20, api_name="/generate")[1]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pages = list(pool.map(visit, range(4)))
    for k, html in enumerate(pages):
        assert html.count("<img") == html.count(f"image: {k} ") == 4
        assert all(f"(seed {seed})" in html for seed in range(4 * k, 4 * k + 4))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, "0-16", "pixel", 6.0, "ancestral", 20), "at most 16 are allowed"),
        ((0, "0", "pixel", 1e40, "ancestral", 2), "finite as float32"),
        ((0, "0", "pixel", 6.0, "ancestral", 100_000), "must lie between 1 and"),
    ],
)
def test_limits_hold_for_programs_too(client, given, said):
    try:
        found = client.predict(*given, api_name="/generate")[0]
    except Exception as error:  # Gradio's own check of a slider
        found = str(error)
    assert said in found or "maximum" in found
    assert "Traceback" not in found


def test_the_page_calls_no_other_server(page):
    """Of all requests of the browser since it started."""
    asked = set()
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert any(url.startswith(page.server.url) for url in asked)
    foreign = {u for u in asked if not u.startswith((page.server.url, "data:", "blob:", "chrome"))}
    assert not foreign


def test_what_is_written_goes_with_the_server(server, page, stop):
    """This test is the last one: it ends the server."""
    assert not list(server.cwd.iterdir())
    files = [path for path in server.temporary.rglob("*") if path.is_file()]
    assert not files  # pictures are never written
    # Gradio prints its own check of a slider.
    others = server.log.read_text().split("Traceback")[1:]
    assert all("maximum value" in one for one in others)
    assert stop(server) == 143
    assert not list(server.temporary.iterdir()) and not list(server.cwd.iterdir())
