"""An agent in ten lines, without a server: replays a recorded GPT-4o answer, token by token. Needs no key."""

import trio

from engine import BasicAgent, Error, StreamingAgent, StreamingConfig, TextDelta
from providers.replay import ReplayProvider

agent = BasicAgent(agent_id="demo", provider=ReplayProvider(), model="gpt4o-short")
# The real one, with `import os` and `from providers.openai_chat import OpenAIChatProvider`:
# agent = BasicAgent(agent_id="demo", provider=OpenAIChatProvider(api_key=os.environ["OPENAI_API_KEY"]), model="gpt-4o")


async def main() -> None:
    async with StreamingAgent.with_config(agent, StreamingConfig()).execute_streaming("Why TTFB?") as events:
        async for event in events:
            match event:
                case TextDelta(text):
                    print(text, end="", flush=True)
                case Error(code, reason):  # nothing is raised: a failure is an event too
                    print(f"\n{code}: {reason}")


trio.run(main)
