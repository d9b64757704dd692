module github.com/kmehsm/kmehsm/client

go 1.26.0

require (
	connectrpc.com/connect v1.21.1
	github.com/kmehsm/kmehsm/api/kme v0.1.0
	github.com/kmehsm/kmehsm/kme v0.1.0
	google.golang.org/protobuf v1.36.12
)

require golang.org/x/crypto v0.58.0 // indirect
