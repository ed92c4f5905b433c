"""The app: the routes of the table over the services, with every error in one shape."""

from __future__ import annotations

from collections.abc import Callable

from quart.routing import QuartRule
from quart_trio import QuartTrio

from .api_socket import install_socket
from .direct import DIRECT
from .errors import install_error_handlers
from .requests import BODY_SECONDS, MAX_BODY_BYTES
from .routes import ROUTES
from .routing import API, direct_routes, install_routes
from .services import Services
from .sse import StreamConnection

__all__ = ["API", "Services", "create_app"]


class MatchedRule(QuartRule):
    """A route that no URL is ever built of: Werkzeug makes code for that, 12 of the 13 ms that our table takes."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:  # noqa: ARG002
        return self._build_nothing

    def _build_nothing(self, *_: object, **__: object) -> tuple[str, str]:
        raise NotImplementedError("URLs are not built of rules here")


def create_app(services: Services) -> QuartTrio:
    """The app over these services. It starts nothing and owns nothing: closing them is the caller's."""
    app = QuartTrio("lumos", static_folder=None)
    app.asgi_http_class = StreamConnection
    app.url_rule_class = MatchedRule
    app.url_map.merge_slashes = False  # else a redirect, which no description of the API tells of
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.config["BODY_TIMEOUT"] = BODY_SECONDS
    install_error_handlers(app)
    if services.guard is not None:
        services.guard.install(app)
    install_routes(app, services, ROUTES)
    app.extensions[DIRECT] = direct_routes(services, ROUTES)
    install_socket(app, services)
    return app
