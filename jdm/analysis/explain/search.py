"""The search for counterfactuals: strengths and shares of pixels, rising until the class flips."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8, UInt32

from jdm.analysis.explain.program import STRIDE
from jdm.analysis.explain_options import AGAIN, ExplainOptions
from jdm.tracking import Progress

Images = UInt8[np.ndarray, "n h w c"]
PerImage = Float[np.ndarray, " n"]

# Seeds of the noise that the target must survive, and of the noise by which that is measured
# afterwards: not those of the counterfactual, and not each other's.
CHOOSING, MEASURING = 2**31, 3 * 2**30


class Found(NamedTuple):
    """What a search found, for each image; where nothing flips, the image itself.

    after, control: uint8 [N, H, W, C]. film: [frames, N, H, W, C], the image, then the result at
    each strength, up to the one that flips, with the same noise. strength, share: NaN where nothing
    flips. draw: int [N], which noise was taken. still: bool [N], whether the target is seen after
    noising and denoising again.
    """

    after: Images
    control: Images
    film: UInt8[np.ndarray, "frames n h w c"]
    strength: PerImage
    share: PerImage
    draw: Int[np.ndarray, " n"]
    still: Bool[np.ndarray, " n"]


def search(
    guided: Callable[..., Images],
    unguided: Callable[..., Images],
    options: ExplainOptions,
    scale: float,
    images: Images,
    seeds: Num[np.ndarray, " n"],
    targets: Float[np.ndarray, "n m"],
    todo: Bool[np.ndarray, " n"],
    shows: Callable[[Images, np.ndarray], Bool[np.ndarray, " k"]],
    convinces: Callable[[Images, np.ndarray, np.ndarray], Bool[np.ndarray, " k"]],
) -> Found:
    """guided, unguided: a Denoiser with the guidance and mask, and with neither. todo: for which
    images. shows: (images [K], their rows) -> whether the model sees the targets of these rows in
    them. convinces: (images [K], their rows, seeds) -> whether it does so with the confidence that
    is required."""
    after, control, count = images.copy(), images.copy(), len(images)
    strengths = [float(one) for one in options.strengths]
    film = np.repeat(images[None], len(strengths) + 1, axis=0)
    strength, share = np.full(count, np.nan), np.full(count, np.nan)
    draw = np.zeros(count, np.int64)

    def tried(rows: np.ndarray, draws: np.ndarray, strength: float, scale: float, shares) -> Images:
        noise = (seeds[rows] + draws * STRIDE) % 2**32
        return guided(images[rows], noise, targets[rows], strength, scale, shares)

    def holds_again(changed: Images, rows: np.ndarray, first_seed: int) -> Bool[np.ndarray, " k"]:
        level = options.again or AGAIN
        return shows(unguided(changed, seeds[rows] + first_seed, targets[rows], level), rows)

    tries = len(options.shares) * len(strengths)
    with Progress(tries * int(todo.sum()), "explaining", "tries") as progress:
        for share_now in options.shares:
            for strength_now in strengths:
                left = np.flatnonzero(todo & np.isnan(strength))
                if not len(left):
                    break
                rows = np.repeat(left, options.draws)
                draws = np.tile(np.arange(options.draws), len(left))
                changed = tried(rows, draws, strength_now, scale, np.full(len(rows), share_now))
                flips = convinces(changed, rows, seeds[rows] + CHOOSING)
                if options.again > 0:
                    flips[flips] = holds_again(changed[flips], rows[flips], CHOOSING)
                far = np.where(flips, distances(changed, images[rows]), np.inf)
                far = far.reshape(len(left), options.draws)
                nearest, found = far.argmin(axis=1), np.isfinite(far.min(axis=1))
                done = left[found]
                after[done] = changed[np.arange(len(left)) * options.draws + nearest][found]
                strength[done], share[done], draw[done] = strength_now, share_now, nearest[found]
                progress.advance(len(left))
        for frame, strength_now in enumerate(strengths, 1):
            rows = np.flatnonzero(strength > strength_now)
            film[frame, rows] = tried(rows, draw[rows], strength_now, scale, share[rows])
            rows = np.flatnonzero(strength <= strength_now)
            film[frame, rows] = after[rows]
            rows = np.flatnonzero(strength == strength_now)
            control[rows] = tried(rows, draw[rows], strength_now, 0.0, share[rows])
    found = np.flatnonzero(~np.isnan(strength))
    still = np.zeros(count, bool)
    still[found] = holds_again(after[found], found, MEASURING)
    return Found(after, control, film, strength, share, draw, still)


def noise_seeds(images: Images, seeds: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """The seed of the noise of each image, from its pixels and its seed.

    At a high strength the noise decides more than what is left of an image, so one noise for all
    would make the results of different images alike. An image has the same noise among any others.
    """
    return seeds + np.array([zlib.crc32(image.tobytes()) for image in images], np.uint32)


def distances(a: Images, b: Images) -> Float[np.ndarray, " k"]:
    """The Euclidean distance of each pair of images, in units of the range of pixels."""
    change = (a.astype(np.float32) - b) / 255
    return np.linalg.norm(change.reshape(len(change), -1), axis=1)
