package vaultstore

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/policies"
)

// A Step is one thing that Setup does, or finds done.
type Step struct {
	What string `json:"what"`
	Done bool   `json:"done"` // it was so before
}

// Setup makes a directory's mount and writes its policies, where they are not as they should be. It changes no object. With
// dryRun it only says what it would do. The client's token must have what directory-admin.hcl gives, and for a new mount
// also sys/mounts.
func Setup(ctx context.Context, client *api.Client, mount string, dryRun bool) (steps []Step, err error) {
	err = New(client, mount).checkMount(ctx)
	exists := err == nil
	if !exists && !errors.Is(err, errNoMount) {
		return nil, err
	}
	steps = append(steps, Step{fmt.Sprintf("mount %s, kv version 2", mount), exists})
	if !exists && !dryRun {
		input := &api.MountInput{Type: "kv", Description: "public keys of devices, signed by their manufacturer", Options: map[string]string{"version": "2"}}
		if err := client.Sys().MountWithContext(ctx, mount, input); err != nil {
			return steps, fmt.Errorf("make mount %s: %w", mount, New(client, mount).explain(err, "mount", mount))
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
			return steps, New(client, mount).explain(err, "read policy", name)
		}
		steps = append(steps, Step{"policy " + name, have == text})
		if have == text || dryRun {
			continue
		}
		if err := client.Sys().PutPolicyWithContext(ctx, name, text); err != nil {
			return steps, New(client, mount).explain(err, "write policy", name)
		}
	}
	return steps, nil
}
