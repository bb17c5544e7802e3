"""Each module here but `peer` is a program that measures one thing; README.md lists them."""
