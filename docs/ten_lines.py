"""An agent in ten lines, without a server: replays a recorded GPT-4o answer, token by token. Needs no key."""

import trio

from engine import BasicAgent, StreamingAgent, StreamingConfig, TextDelta
from providers.replay import ReplayProvider

agent = BasicAgent(agent_id="demo", provider=ReplayProvider(), model="gpt4o-short")
# The real one, with `import os` and `from providers.openai_chat import OpenAIChatProvider`:
# agent = BasicAgent(agent_id="demo", provider=OpenAIChatProvider(api_key=os.environ["OPENAI_API_KEY"]), model="gpt-4o")


async def main() -> None:
    async with StreamingAgent.with_config(agent, StreamingConfig()).execute_streaming("Why TTFB?") as events:
        async for event in events:
            if isinstance(event, TextDelta):
                print(event.content, end="", flush=True)


trio.run(main)
