package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func device(c *cli.Context) error {
	imei, err := kme.ParseIMEI(c.Args().First())
	if err != nil {
		return usage.Mark(err)
	}
	return withStore(c, func(store *sqlstore.Store) error {
		lots, err := openLots(c, store)
		if err != nil {
			return err
		}
		manifest, d, err := lots.Device(c.Context, imei)
		if err != nil {
			return err
		}
		result := map[string]any{"imei": imei, "lot": manifest.Lot, "manufacturer": manifest.Manufacturer,
			"shard": d.Shard, "public_key": directory.DeviceKey{IMEI: imei, Key: d.Key}, "revoked": d.Revoked != nil}
		if d.Revoked != nil {
			result["revocation"] = d.Revoked
		}
		if d.Lot != nil {
			result["lot_revoked"] = d.Lot
		}
		if len(d.History) > 0 {
			result["history"] = d.History
		}
		return cmdline.Print(c, result, func(w io.Writer) {
			key, _ := json.Marshal(result["public_key"])
			fmt.Fprintf(w, "IMEI          %s\nlot           %s, shard %d\nmanufacturer  %s\npublic key    %s\n", imei,
				manifest.Lot, d.Shard, manifest.Manufacturer, key)
			for i, e := range d.History {
				what := "REVOKED     "
				switch {
				case e.Key != nil:
					what = "new key     "
				case d.Lot != nil && i == len(d.History)-1:
					what = "LOT REVOKED "
				}
				fmt.Fprintf(w, "%s  %s: %s\n", what, e.Time.Format(time.RFC3339), e.Reason)
			}
			fmt.Fprintln(w, "the signatures of manifest, shard and revocations are the manufacturer's")
		})
	})
}
