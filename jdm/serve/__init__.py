"""A local web page for one trained model: generate, classify, explain. `jdm serve` starts it.

options: what can be set, without Gradio. server: the process, its temporary folder, what is refused
before it reaches Gradio. page: the tabs, put together from generate, classify, explain and about.
pad: where pictures are uploaded, photographed and drawn. uploads: their checks. choices: what can
be chosen, from the declarations. jobs: work that can be cancelled. show: results as HTML.

Calls the public functions of jdm, and has no mathematics of its own. Nothing that a visitor sends
is written to a file.
"""
