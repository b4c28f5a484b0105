module examples

go 1.18
