package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/keysvcd/operator"
)

func storageCommand() *cli.Command {
	return &cli.Command{
		Name: "storage", Usage: "the storage key, which seals KMEs in the store",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list the generations that the token has, and how many KMEs are sealed under each",
				Flags: storeFlags(), Action: storageList,
			},
			{
				Name: "rotate", Usage: "make a new storage key, and seal all KMEs again under it, while services serve",
				Description: "If it is interrupted, run it again. Services use the new key by themselves. With " +
					"several tokens, bring the new key to the others with keysvc backup: until then they cannot open " +
					"KMEs under it. At the end, run keysvc storage retire.",
				Flags:  storeFlags(soPINFlag),
				Action: cmdline.Alone(cmdline.Requiring(storageRotate, "so-pin-source")),
			},
			{
				Name: "retire", Usage: "destroy the earlier storage keys, if nothing is sealed under them any more",
				Description: "A backup of the store that was made before the rotation cannot be used after that. " +
					"With several tokens, run this once for each.",
				Flags:  storeFlags(cmdline.Yes),
				Action: cmdline.Alone(storageRetire),
			},
		},
	}
}

func storageList(c *cli.Context) error {
	return withTokenAndStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		all, err := operator.StorageKeys(c.Context, token, store)
		if err != nil {
			return err
		}
		return cmdline.Print(c, map[string]any{"storage_keys": all}, func(w io.Writer) {
			fmt.Fprintf(w, "%10s  %s\n", "GENERATION", "KMES")
			for _, k := range all {
				fmt.Fprintf(w, "%10d  %d\n", k.Generation, k.KMEs)
			}
		})
	})
}

func storageRotate(c *cli.Context) (err error) {
	officer, err := officerPIN(c)
	if err != nil {
		return err
	}
	uri, err := tokenURI(c)
	if err != nil {
		return err
	}
	r, err := hsmkeys.OpenRotation(c.Context, uri, officer, hsmkeys.Options{})
	if err != nil {
		return err
	}
	return errors.Join(useStore(c, r.OperatorToken, func(store *sqlstore.Store) error {
		return reseal(c, r, store)
	}), r.Close())
}

func reseal(c *cli.Context, r *hsmkeys.Rotation, store *sqlstore.Store) error {
	below, began := hsmkeys.SealedFrom(r.Newest), time.Now()
	total, err := store.CountSealed(c.Context, below)
	if err != nil {
		return err
	}
	if !r.Made {
		fmt.Fprintf(c.App.ErrWriter, "no new key was made: generation %d is of a rotation that was not ended; for "+
			"another key, run keysvc storage retire first, and then this again\n", r.Newest)
	}
	fmt.Fprintf(c.App.ErrWriter, "%d KMEs to be sealed again under generation %d of the storage key\n",
		total, r.Newest)
	shown := cmdline.NewProgress(c, "sealed again", "KMEs", total)
	done, err := tokenkeys.Reseal(c.Context, r, store, below, shown.At)
	shown.Close()
	if err != nil && done > 0 {
		return cmdline.Partial(fmt.Errorf("%d of %d KMEs were sealed again; run the same command again: %w",
			done, total, err))
	}
	if err != nil {
		return err
	}
	seconds := time.Since(began).Seconds()
	return cmdline.Printf(c, map[string]any{"generation": r.Newest, "made": r.Made, "resealed": done,
		"seconds": seconds},
		"%d KMEs were sealed again, in %.0f s; all are under generation %d of the storage key now\n"+
			"end with keysvc storage retire\n",
		done, seconds, r.Newest)
}

func storageRetire(c *cli.Context) error {
	return withTokenAndStore(c, func(token *hsmkeys.OperatorToken, store *sqlstore.Store) error {
		loss, err := tokenkeys.RetirementLoss(c.Context, token)
		if err == nil {
			err = cmdline.Confirm(c, loss, token.Serial())
		}
		if err != nil {
			return err
		}
		destroyed, err := tokenkeys.RetireStorage(c.Context, token, store)
		if err != nil && len(destroyed) > 0 {
			err = cmdline.Partial(fmt.Errorf("not all earlier storage keys are destroyed; run the same command "+
				"again: %w", err))
		} else if err != nil {
			return err
		}
		return errors.Join(cmdline.Printf(c, map[string]any{"destroyed": append([]int{}, destroyed...)},
			"%d earlier storage keys are destroyed in %s\n", len(destroyed), token), err)
	})
}
