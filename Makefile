# Names for people. What depends on what stands in dvc.yaml.
.PHONY: help reproduce doctor profile report chat serve experiments bench streaming multilora client-accuracy speedups quickstart-vllm quickstart-trtllm estimate publish test check digests lock
TOOLS = containers/run venv:tools

help:       ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/: .*## /\t/' | expand -t 18
reproduce:  ## the whole pipeline, from dataset to verdicts; embedded: 8 to 19 minutes, no GPU. PROFILE=weightless|writeup: a GPU; VERBOSE=1: all output
	@exec $(TOOLS) python -m tools.reproduce $(PROFILE)
doctor:     ## seconds: what PROFILE=... needs and what this machine has, as a checklist
	@$(TOOLS) python -m tools.doctor $(PROFILE)
profile:    ## seconds: write PROFILE=embedded|weightless|writeup into params.yaml
	@$(TOOLS) python -m tools.profile $(PROFILE)
report:     ## seconds, no model: the report and the tables of README and docs/, from the committed references and this checkout's run
	@$(TOOLS) python -m tools.report
chat:       ## seconds to load: talk to the model. ADAPTER=lora|qlora|none|lora-published, ONCE="a question"; SERVER=triton|triton-stream|trtllm|vllm URL=...
	@exec $(TOOLS) python -m tools.chat $(ADAPTER) $(if $(SERVER),--server=$(SERVER)) $(if $(URL),--url=$(URL)) $(if $(value ONCE),--once="$$ONCE")
serve:      ## half a minute until it is ready: SERVER=triton|vllm with the adapters (ADAPTER=none: without), until Ctrl-C
	@exec $(TOOLS) python -m tools.serve $(SERVER) $(ADAPTER)
experiments: ## seconds: every experiment of the benchmark, its points, what it takes, and what runs it
	@$(TOOLS) python -m tools.experiments
bench:      ## minutes to hours (see make experiments): one experiment, EXPERIMENT=gpt-oss; BUDGET=30m stops it, run again to resume
	@$(TOOLS) python -m tools.bench $(EXPERIMENT)
streaming:  ## 2 minutes: the writeup's streaming prompts to every server, and what one BLS instance does to two requests
	@$(TOOLS) python -m tools.repro studies/dvc.yaml:streaming
multilora:  ## 5 to 8 minutes: several LoRA adapters on one base model: does each request get its own, and what do they cost?
	@$(TOOLS) python -m tools.repro studies/dvc.yaml:multilora
client-accuracy: ## 10 min, no GPU: how accurately the load clients measure, against a server of known timing
	@$(TOOLS) python -m tools.repro studies/dvc.yaml:client_accuracy
speedups:   ## 6 min, no GPU: five ways to speed up a local model, Transformers against vLLM, and what a KV cache takes
	@$(TOOLS) python -m tools.repro studies/dvc.yaml:speedups studies/dvc.yaml:kv_cache
quickstart-vllm: ## 2 minutes: the vLLM guide's examples: one prompt, a list, the OpenAI server
	@$(TOOLS) python -m tools.quickstart_vllm
quickstart-trtllm: ## a minute or two: the Llama 2 quick start: build, run, serve, curl; without TensorRT-LLM its stand-in answers
	@$(TOOLS) python -m tools.repro repository@base
	@$(TOOLS) python -m tools.quickstart_trtllm
estimate:   ## seconds, no GPU: what should a card give? CARD=a100_sxm MODEL=llama-2-7b FORMAT=bf16 USERS=1,16,64; ENGINE=trtllm|vllm
	@exec $(TOOLS) python -m tools.estimate $(CARD) $(MODEL) $(FORMAT) $(USERS) $(ENGINE)
publish:    ## seconds: this checkout's run as results/reference/NAME=...
	@$(TOOLS) python -m tools.publish $(NAME)
check:      ## seconds: do dvc.yaml, params.yaml, profiles/, containers/ and stages/ agree?
	@$(TOOLS) python -m pytest tests/graph/test_pipeline.py
test:       ## 9 to 16 min, no GPU: all tests, with the real servers
	@$(TOOLS) python -m pytest -n 2 --no-loadscope-reorder tests
digests:    ## seconds, network: find the digests of the images that have none yet; no environment changes
	@$(TOOLS) python -m tools.lock --digests
lock:       ## a minute, network: lock the environments anew, resolve image digests
	@$(TOOLS) python -m tools.lock
