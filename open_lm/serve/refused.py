"""A request that is not served: the status, and a message for the client in OpenAI's form."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """An expected error of a request; `parameter` names the field at fault."""

    def __init__(
        self, status: int, message: str, parameter: str | None = None, code: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message, parameter, code
        self.headers = {name.replace("_", "-").title(): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names of errors by status, where they are not plain invalid_request_error."""
