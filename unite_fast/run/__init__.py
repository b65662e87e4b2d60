"""A run's folder and what is done before, around and after its training loop.

runs/<name>/   config.resolved.yaml  provenance.json  status.json  run.lock  metrics.csv  metrics.jsonl
               samples/step_*.png    checkpoints/step-*/   logs/rank_*.log    began_from.txt
               starts.jsonl          a line per start: its step, provenance and configuration
"""
