"""The search for counterfactuals: strengths and shares of pixels, rising until the class flips."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

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
    each strength, up to the one that flips. strength, share: NaN where nothing flips. still: bool
    [N], whether the target is seen after noising and denoising again.
    """

    after: Images
    control: Images
    film: UInt8[np.ndarray, "frames n h w c"]
    strength: PerImage
    share: PerImage
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
    shows: Callable[[Images, np.ndarray, float], Bool[np.ndarray, " k"]],
) -> Found:
    """guided, unguided: a Denoiser with the guidance and mask, and with neither. todo: for which
    images. shows: (images [K], their rows, confidence) -> whether the model sees the targets of
    these rows in them, at least with the confidence."""
    after, control = images.copy(), images.copy()
    film = np.repeat(images[None], len(options.strengths) + 1, axis=0)
    strength, share = np.full(len(images), np.nan), np.full(len(images), np.nan)

    def holds_again(changed: Images, rows: np.ndarray, first_seed: int) -> Bool[np.ndarray, " k"]:
        level = options.again or AGAIN
        again = unguided(changed, seeds[rows] + first_seed, targets[rows], level)
        return shows(again, rows, 0.0)

    tries = len(options.shares) * len(options.strengths)
    with Progress(tries * int(todo.sum()), "explaining", "tries") as progress:
        for share_now in options.shares:
            frames = np.repeat(images[None], len(options.strengths) + 1, axis=0)
            for number, strength_now in enumerate(options.strengths, 1):
                rows = np.flatnonzero(todo & np.isnan(strength))
                shares = np.full(len(rows), share_now, float)
                of = images[rows], seeds[rows], targets[rows]
                changed = guided(*of, float(strength_now), scale, shares)
                frames[number:, rows] = changed
                flips = shows(changed, rows, options.confidence)
                if options.again > 0:
                    flips[flips] = holds_again(changed[flips], rows[flips], CHOOSING)
                done = rows[flips]
                after[done], strength[done], share[done] = changed[flips], strength_now, share_now
                film[:, done] = frames[:, done]
                progress.advance(int((todo & np.isnan(strength)).sum() + len(done)))
        for strength_now in np.unique(strength[~np.isnan(strength)]):
            rows = np.flatnonzero(strength == strength_now)
            of = images[rows], seeds[rows], targets[rows]
            control[rows] = guided(*of, float(strength_now), 0.0, share[rows])
    found = np.flatnonzero(~np.isnan(strength))
    still = np.zeros(len(images), bool)
    still[found] = holds_again(after[found], found, MEASURING)
    return Found(after, control, film, strength, share, still)
