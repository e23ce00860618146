"""Every key of a config, with its default. A config file starts from here and changes some.

What a value may be is checked by jdm.config; what it does is said where the section goes:
model -> jdm.nn.model.JointModel, diffusion -> jdm.diffusion.process.Diffusion, loss ->
jdm.training.loss.JointLoss, optim -> jdm.training.build.make_optimiser, the rest -> jdm.trainer.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,  # of the weights, the order of the images, and every draw in training
            data=dict(
                name="digits",  # of `jdm data list`, or folder:/path
                dir="",  # of prepared data sets; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
                cache_dir="",  # of decoded images; "" is a folder in dir
                workers=0,  # processes that decode each image anew, for what is too large to keep
                batch_size=64,  # global: over all devices of all hosts
                validation=0.05,  # share of train that is held out, where no such split exists
                classes=(),  # those that are kept, in the order of their new labels; () is all
                limit=0,  # training images at most, of each class alike; 0 is all
                labelled_fraction=1.0,  # of the training labels; the others are hidden
                labelled_per_class=0,  # so many of each class instead
                unlabelled="",  # a second set, whose images are added without their labels
            ),
            model=dict(
                image_size=8,
                image_channels=1,
                num_classes=10,
                multi_label=False,  # True: each class is a yes or a no of its own
                channels=32,
                multipliers=(1, 2),
                blocks=2,
                attention=(4,),  # side lengths of the feature maps that get attention
                heads=4,
                dropout=0.1,
                learned_variance=False,
                resample="conv",
                attention_order="head_first",
                head="normalised",
                head_time="raw",  # what the head is told of the time: its own, or "zero" always
                head_width=128,  # of the hidden layer; the published head has its own
                head_dropout=0.3,
                dtype="float32",
                remat=False,  # blocks computed again for the gradient: less memory, more time
            ),
            diffusion=dict(steps=1000, schedule="linear", prediction="eps", variance="fixed_large"),
            loss=dict(
                terms="joint",  # what is trained; or "diffusion" or "classifier" alone
                kind="mse",  # or the variational bound: "kl", "rescaled_kl" (times T)
                weight=0.1,  # lambda, of the classifier's cross-entropy
                classify="both",  # what the classifier is trained on: clean, noised or both
                classify_after=0,  # the step at which the classifier's term joins
                augment="none",  # of its clean images: none, published, repaired, digits or natural
                min_snr_gamma=0.0,  # 0: every noise level weighs the same
                variance_weight=0.001,  # of the bound, where the variance is learned
            ),
            optim=dict(
                lr=1e-4,
                schedule="constant",
                warmup_steps=0,
                weight_decay=0.0,
                clip_norm=1.0,  # 0: gradients are not clipped
                b1=0.9,
                b2=0.999,
            ),
            train=dict(
                steps=1000,
                ema_decay=0.999,
                t_sampler="uniform",  # how noise levels are drawn; or "loss_second_moment"
                accumulate=1,  # parts that a batch is taken in, where it does not fit in memory
                ema_warmup=True,  # a shorter memory in the first steps
                init_from="",  # a work folder, or "digits": weights it starts from, where they fit
            ),
            # Cadences, in steps; 0 is never. The last step logs, evaluates and saves in any case.
            log=dict(every=100),
            eval=dict(every=1000, batch_size=256, split="validation"),
            checkpoint=dict(every=1000, keep=3),
        )
    )
