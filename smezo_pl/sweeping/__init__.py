"""Many runs from one configuration and a grid of values: enumerated, run one by one, resumed, summed up."""
