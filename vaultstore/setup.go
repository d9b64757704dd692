package vaultstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/policies"
)

// A Step is one thing that Setup does, or finds done.
type Step struct {
	What string `json:"what"`
	Done bool   `json:"done"` // it was so before
}

// Setup makes a directory's mount and writes its policies, where they are not as they should be. It changes no
// object. With dryRun it only says what it would do. The client's token is of whoever runs Vault: whoever may
// write policies may do everything, so none of ours allows that.
func Setup(ctx context.Context, client *api.Client, mount string, dryRun bool) (steps []Step, err error) {
	store := New(client, mount)
	explain := func(err error, what, path string) error {
		if statusOf(err) == http.StatusForbidden {
			return fmt.Errorf("this token may not %s %s in Vault (403): a directory is set up with a token of whoever "+
				"runs Vault, which may make mounts and policies", what, path)
		}
		return store.explain(err, what, path)
	}
	err = store.checkMount(ctx)
	exists := err == nil
	if !exists && !errors.Is(err, errNoMount) {
		return nil, err
	}
	steps = append(steps, Step{What: fmt.Sprintf("mount %s, kv version 2", mount), Done: exists})
	if !exists && !dryRun {
		input := &api.MountInput{Type: "kv", Description: "public keys of devices, signed by their manufacturer",
			Options: map[string]string{"version": "2"}}
		if err := client.Sys().MountWithContext(ctx, mount, input); err != nil {
			return steps, explain(err, "mount", "sys/mounts/"+mount)
		}
	}
	for _, role := range policies.Names {
		text, err := policies.Of(mount, role)
		if err != nil {
			return steps, err
		}
		name := policies.Name(mount, role)
		have, err := client.Sys().GetPolicyWithContext(ctx, name)
		if err != nil {
			return steps, explain(err, "read", "sys/policies/acl/"+name)
		}
		steps = append(steps, Step{What: "policy " + name, Done: have == text})
		if have == text || dryRun {
			continue
		}
		if err := client.Sys().PutPolicyWithContext(ctx, name, text); err != nil {
			return steps, explain(err, "write", "sys/policies/acl/"+name)
		}
	}
	return steps, nil
}
