"""Every key of a config: its default, what it does, and what is allowed.

A config file starts from `get_config()` and changes some values. The sections are read by: model,
jdm.nn.model.JointModel; diffusion, jdm.diffusion.process.Diffusion; loss,
jdm.training.loss.JointLoss; optim, jdm.training.build.make_optimiser; the others, jdm.trainer.

A checkpoint is tied to its model, diffusion and loss. The section exec, which says how they are
computed, may differ whenever a run is resumed or a model is loaded. (With the head "published",
which normalises over the rows that it sees together, exec.accumulate changes the result too.)
"""

import functools
from typing import Any

from ml_collections import ConfigDict, FieldReference

from jdm import names
from jdm.options import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, Option, Rule

VERSION = 1  # of the keys; jdm.config.migrate converts older configs

SEED = Rule("between 0 and 2147483647", lambda v: 0 <= v < 2**31)
SIDES = Rule("positive whole numbers", lambda v: all(isinstance(s, int) and s > 0 for s in v))
LEVELS = Rule("one or more positive whole numbers", lambda v: len(v) > 0 and SIDES.holds(v))
DIFFERENT = Rule("one or more different names", lambda v: len(set(v)) == len(v) > 0)
METRIC = Rule(
    f'"" or one of {", ".join(names.METRICS)}', lambda v: not v or names.metric_of(v) is not None
)
CLASSES = Rule(
    "two or more different whole numbers from 0 up, or ()",
    lambda v: all(isinstance(c, int) and c >= 0 for c in v) and len(set(v)) == len(v) != 1,
)

_resumable = functools.partial(Option, resumable=True)  # a key that a resumed run may change

KEYS: dict[str, Option | dict[str, Option]] = dict(
    version=Option(VERSION, "of these keys; older configs are migrated when they are read"),
    seed=Option(0, "of the initial weights, the order of images and all random draws", SEED),
    data=dict(
        name=Option("digits", "see `jdm data list`", names=names.DATASETS, folder=True),
        dir=_resumable("", 'of prepared data; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets'),
        cache_dir=_resumable("", 'of decoded images; "" is a folder in dir'),
        workers=_resumable(
            0, "processes that decode each image when it is read; 0: decode once", NOT_NEGATIVE
        ),
        batch_size=Option(64, "over all devices of all hosts", POSITIVE),
        validation=Option(0.05, "share of train, if there is no validation split", FRACTION),
        classes=Option((), "to keep, in the order of their new labels; () is all", CLASSES),
        limit=Option(0, "most training images, balanced over classes; 0 is all", NOT_NEGATIVE),
        labelled_fraction=Option(1.0, "of the training labels; the others are hidden", SHARE),
        labelled_per_class=Option(0, "number kept in each class; 0: not used", NOT_NEGATIVE),
        unlabelled=Option("", "a data set added without labels", names=names.DATASETS, folder=True),
    ),
    model=dict(
        image_size=Option(8, "height and width in pixels", POSITIVE),
        image_channels=Option(1, "1 (grey) or 3 (RGB)", POSITIVE),
        num_classes=Option(10, "number of classes, or of attributes with multi_label", POSITIVE),
        multi_label=Option(False, "whether the classes are independent attributes"),
        channels=Option(32, "of the first level", POSITIVE),
        multipliers=Option((1, 2), "of channels, one for each level", LEVELS),
        blocks=Option(2, "residual blocks of each level", POSITIVE),
        attention=Option((4,), "side lengths of the feature maps that get attention", SIDES),
        heads=Option(4, "of each attention layer", POSITIVE),
        head_channels=Option(0, "channels of each attention head; 0: see heads", NOT_NEGATIVE),
        dropout=Option(0.1, "of the residual blocks", FRACTION),
        learned_variance=Option(False, "whether the output includes the reverse step's variance"),
        resample=Option("conv", "how resolution changes between levels", names=names.RESAMPLES),
        time_conditioning=Option(
            "scale_shift", "of the residual blocks", names=names.TIME_CONDITIONINGS
        ),
        attention_order=Option("head_first", "qkv channel layout", names=names.ATTENTION_ORDERS),
        head=Option("normalised", "the classifier", names=names.HEADS),
        head_time=Option("raw", "time given to the head: t or always 0", names=names.HEAD_TIMES),
        head_width=Option(128, "of the hidden layer; not for the published head", POSITIVE),
        head_dropout=Option(0.3, "of the head", FRACTION),
    ),
    diffusion=dict(
        steps=Option(1000, "T, the number of noise levels", POSITIVE),
        schedule=Option("linear", "of the noise levels", names=names.SCHEDULES),
        prediction=Option("eps", "the quantity that the network predicts", names=names.PREDICTIONS),
        variance=Option("fixed_large", "of a reverse step", names=names.VARIANCES),
    ),
    loss=dict(
        terms=Option(("diffusion", "classifier"), "to train with", DIFFERENT, names=names.TERMS),
        kind=Option("mse", "the diffusion term: mean square or bound", names=names.LOSS_KINDS),
        weight=Option(0.1, "lambda, of the classifier's cross-entropy", NOT_NEGATIVE),
        classify=Option("both", "the images the classifier is trained on", names=names.CLASSIFIED),
        classify_after=Option(0, "the step from which the classifier is trained", NOT_NEGATIVE),
        augment=Option("none", "of the classifier's clean images", names=names.POLICIES),
        min_snr_gamma=Option(0.0, "0: every noise level has the same weight", NOT_NEGATIVE),
        variance_weight=Option(0.001, "of the bound, where the variance is learned", NOT_NEGATIVE),
    ),
    optim=dict(
        lr=Option(1e-4, "peak learning rate of AdamW", POSITIVE),
        schedule=Option("constant", "learning rate after the warm-up", names=names.LR_SCHEDULES),
        warmup_steps=Option(0, "in which the learning rate rises from 0", NOT_NEGATIVE),
        weight_decay=Option(0.0, "of AdamW", NOT_NEGATIVE),
        clip_norm=Option(1.0, "the gradient's largest global norm; 0: not clipped", NOT_NEGATIVE),
        b1=Option(0.9, "of AdamW", FRACTION),
        b2=Option(0.999, "of AdamW", FRACTION),
    ),
    train=dict(
        steps=_resumable(1000, "of the optimiser", POSITIVE),
        ema_decay=Option(0.999, "of the EMA of the weights", FRACTION),
        ema_warmup=Option(True, "smaller decay in the first steps"),
        t_sampler=Option("uniform", "how noise levels are drawn", names=names.T_SAMPLERS),
        patience=_resumable(
            0, "evaluations without a better checkpoint.best, then the run ends", NOT_NEGATIVE
        ),
        init_from=Option(
            "", 'a work folder, hf://owner/name, or "digits": initial weights, where they fit'
        ),
    ),
    exec=dict(
        dtype=_resumable("float32", "of the computation; weights are float32", names=names.DTYPES),
        attention=_resumable(
            "auto", "implementation; see jdm.nn.attention", names=names.ATTENTIONS
        ),
        mesh=_resumable(
            "data",
            "how weights and their training state lie on the devices: whole, or split (fsdp)",
            names=names.MESHES,
        ),
        remat=_resumable(
            "none", "what the gradient computes again: less memory, more time", names=names.REMATS
        ),
        accumulate=_resumable(
            1, "parts of a batch, one after the other; BatchNorm sees only its part", POSITIVE
        ),
    ),
    # Intervals in steps; 0 is never. The last step logs, evaluates and saves in any case, and an
    # evaluation that finds the best value of checkpoint.best saves too.
    log=dict(every=_resumable(100, "steps between rows of metrics", NOT_NEGATIVE)),
    eval=dict(
        every=_resumable(1000, "steps between evaluations", NOT_NEGATIVE),
        metrics=_resumable(("classification",), "evaluators", DIFFERENT, names=names.EVALUATORS),
        batch_size=_resumable(256, "of the evaluation", POSITIVE),
        split=_resumable("validation", "the split to evaluate on", names=names.SPLITS),
        samples=_resumable(1000, "images to generate for an evaluation", POSITIVE),
        features=_resumable(
            "reference", "of images, for the distances between them", names=names.EXTRACTORS
        ),
        bound_steps=_resumable(
            50, "noise levels at which each image's bound is computed; 0: all of them", NOT_NEGATIVE
        ),
        ood=_resumable(
            "", "a data set to tell from data.name, for ood", names=names.DATASETS, folder=True
        ),
    ),
    checkpoint=dict(
        every=_resumable(1000, "steps between checkpoints", NOT_NEGATIVE),
        keep=_resumable(3, "newest checkpoints to keep", POSITIVE),
        keep_every=_resumable(
            0, "keep every checkpoint whose step divides by this too; 0: none", NOT_NEGATIVE
        ),
        best=_resumable("", "a metric: the checkpoint of its best value is kept too", METRIC),
    ),
)


def get_config() -> ConfigDict:
    """A config of all keys with their defaults."""

    def defaults(key: Any) -> Any:
        return key.default if isinstance(key, Option) else {k: defaults(v) for k, v in key.items()}

    config = ConfigDict(defaults(KEYS))
    remat = config.exec.remat  # of any type: older files set it to a bool
    del config.exec["remat"]
    config.exec.remat = FieldReference(remat, field_type=object)
    return config
