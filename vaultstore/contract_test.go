package vaultstore

import (
	"fmt"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/storetest"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

func TestVaultStore(t *testing.T) {
	server, mounts := vaulttest.Any(t), 0
	storetest.Run(t, func(t *testing.T) (directory.Store, directory.Store) {
		mounts++
		mount := fmt.Sprintf("kme%d", mounts)
		server.Mount(t, mount, "2")
		return New(server.Client(t, server.Root), mount), New(server.Client(t, server.Root), "/"+mount+"/")
	})
}
