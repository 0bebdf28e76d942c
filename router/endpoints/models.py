"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from contracts.errors import NotFound
from router.chat import ChatService


def model_list(service: ChatService, created: int) -> dict[str, Any]:
    """A card for each name; `created` is when this router started, in Unix seconds."""
    data = [_card(service, name, created) for name in service.config.names]
    return {"object": "list", "data": data}


def model_card(service: ChatService, name: str, created: int) -> dict[str, Any]:
    """One card.

    Raises:
        NotFound: not a served name.
    """
    if name not in service.config.names:
        raise NotFound(f"the model {name[:80]!r} does not exist", "model")
    return _card(service, name, created)


def _card(service: ChatService, name: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": service.config.served_model_name,
        "parent": None,
        "max_model_len": service.known_max_model_len(),
        "permission": [],
    }
