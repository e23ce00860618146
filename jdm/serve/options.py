"""ServeOptions: what can be set about the page, declared once. Imports neither JAX nor Gradio."""

import dataclasses
import typing

from jdm.options import POSITIVE, Rule, check_fields, declared, options_of

PORT = Rule("between 0 and 65535", lambda v: 0 <= v <= 65535)


@typing.no_type_check  # of the tests' run-time checker, so that Option.check reports wrong types
@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Raises InvalidValue for a wrong type or range."""

    host: str = declared(
        "127.0.0.1", "the address to listen on; the default is reached from this machine alone"
    )
    port: int = declared(7860, "the port; 0 takes a free one", PORT)
    queue: int = declared(32, "requests that may wait; further ones are refused", POSITIVE)
    images: int = declared(16, "the most images of one request", POSITIVE)
    megabytes: int = declared(8, "the most megabytes of an uploaded picture", POSITIVE)
    megapixels: int = declared(24, "the most millions of pixels of an uploaded picture", POSITIVE)

    def __post_init__(self):
        check_fields(self)


OPTIONS = options_of(ServeOptions)
