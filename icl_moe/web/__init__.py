"""The page of `icl-moe web`. `work` and `cards` need no Gradio; `page` and `serve` do."""
