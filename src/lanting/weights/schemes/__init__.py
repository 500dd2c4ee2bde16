"""How other programs store packed weights: a module tells one's from headers, without torch (`bnb`, `gptq`,
`compressed`, `svdq`, `mlx`, `sdnq`, `dfloat11`), and `layouts` names what puts their parts in our order (`codes`,
`ordered`, `svdq_tiles`). `weights.forms` asks them in turn.
"""
