"""Run files that follow published recipes for continual pre-training; `ratoon recipe` lists them."""
