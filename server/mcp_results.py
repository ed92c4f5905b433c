"""What a tool of an MCP server answered, in the form that the model sees."""

from __future__ import annotations

from mcp_types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

from engine.tools import ToolResult


def tool_result(result: CallToolResult) -> ToolResult:
    """Its structured content if there is any, else its texts; of images, sounds and binary resources, a description.

    A failure is always told in its texts.
    """
    if result.is_error:
        return ToolResult(_text(result) or "the tool failed and did not say why", failed=True)
    if result.structured_content is not None:
        return ToolResult(result.structured_content)
    return ToolResult(_text(result))


def _text(result: CallToolResult) -> str:
    return "\n".join(_block_text(block) for block in result.content)


def _block_text(block: ContentBlock) -> str:
    match block:
        case TextContent(text=text):
            return text
        case ImageContent() | AudioContent():
            return f"[{block.type} of type {block.mime_type}, about {_decoded_bytes(block.data)} bytes; not shown]"
        case ResourceLink():
            size = "" if block.size is None else f", {block.size} bytes"
            return f"[link to the resource {block.uri}, {block.mime_type or 'of unknown type'}{size}]"
        case EmbeddedResource():
            return _resource_text(block.resource)


def _resource_text(resource: TextResourceContents | BlobResourceContents) -> str:
    if isinstance(resource, TextResourceContents):
        return resource.text
    size = _decoded_bytes(resource.blob)
    return f"[resource {resource.uri} of type {resource.mime_type or 'unknown'}, about {size} bytes; not shown]"


def _decoded_bytes(base64: str) -> int:
    return len(base64) * 3 // 4
