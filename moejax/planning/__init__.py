"""Plans: what a config needs and how fast it may be on chips that are not here.

From bottom to top: `hlo` and `loops` read a compiled program; `flops`, `collectives`, `memory` and
`traffic` count in it; `roofline` turns counts into seconds; `pod` compiles for TPUs, `node` plans
GPUs by formula; `search` tries changes; `show` prints.
"""
