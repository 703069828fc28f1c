"""Entry point of a started engine: vLLM's own OpenAI server, unchanged.

`python -m m2train.rollout.serve ...` takes the flags of `python -m vllm.entrypoints.openai.api_server`. Started
that way, vLLM's spawned children would import the whole HTTP server again as their main module; this file is the
main module instead, and empty for them, which saves 2-3 s per child on 2 cores.
"""

if __name__ == "__main__":
    import runpy

    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
