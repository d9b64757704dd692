package settings

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/webhook"
)

// An Equipment says how CheckEquipment answers, and what becomes of what it was asked.
type Equipment struct {
	Lists             string        `yaml:"lists"`
	OtherDevice       string        `yaml:"other_device"`
	OtherSubscription string        `yaml:"other_subscription"`
	NotInLot          string        `yaml:"not_in_lot"`
	History           time.Duration `yaml:"history"`
	HistoryRows       int           `yaml:"history_rows"`
	Webhook           struct {
		URL        string `yaml:"url"`
		SecretFile string `yaml:"secret_file" path:""`
		CA         string `yaml:"ca" path:""`
	} `yaml:"webhook"`
}

// equipmentSettings are those of an Equipment.
func equipmentSettings() []config.Setting[Config] {
	p := binding.DefaultEquipmentPolicy()
	status := func(s binding.EquipmentStatus) string { return strings.ToLower(string(s)) }
	colours := []string{"whitelisted", "greylisted", "blacklisted"}
	one := func(name, example, help string, may []string, of func(e *Equipment) string) config.Setting[Config] {
		return config.Setting[Config]{Name: "equipment." + name, Example: example, Help: help,
			Rule: strings.Join(may[:len(may)-1], ", ") + " or " + may[len(may)-1],
			OK:   func(c *Config) bool { return slices.Contains(may, of(&c.Equipment)) }}
	}
	return []config.Setting[Config]{
		{Name: "equipment", Default: fmt.Sprintf("{lists: first, other_device: %s, other_subscription: %s, "+
			"not_in_lot: %s, history: 9600h, history_rows: 10000000}", status(p.OtherDevice),
			status(p.OtherSubscription), status(p.NotInLot)), Example: "{lists: first}",
			Help: "how CheckEquipment answers (docs/equipment.md), and what is stored about devices:"},
		one("lists", "first",
			"whether the list of keysvc equipment add decides first or last", []string{"first", "last"},
			func(e *Equipment) string { return e.Lists }),
		one("other_device", status(p.OtherDevice),
			"for a device with an IMSI that is bound to another one: whitelisted, greylisted or blacklisted", colours,
			func(e *Equipment) string { return e.OtherDevice }),
		one("other_subscription", status(p.OtherSubscription),
			"for a device that is proven for other IMSIs only", colours,
			func(e *Equipment) string { return e.OtherSubscription }),
		one("not_in_lot", status(p.NotInLot), "for a device that cannot prove itself; also unknown",
			append(slices.Clip(colours), "unknown"), func(e *Equipment) string { return e.NotInLot }),
		{Name: "equipment.history", Example: "9600h",
			Help: "how long it is stored which IMSI was seen with which IMEI (0s: not at all)",
			Rule: "0s, or a time from 1h on",
			OK: func(c *Config) bool {
				return c.Equipment.History == 0 || c.Equipment.History >= time.Hour
			}},
		{Name: "equipment.history_rows", Example: "10000000",
			Help: "how many of these are stored at most", Rule: "a whole number above zero",
			OK: func(c *Config) bool { return c.Equipment.HistoryRows > 0 }},
		{Name: "equipment.webhook", Example: "{url: https://..., secret_file: FILE}",
			Help: "gets an event for each IMSI that moves to another device; ca: FILE names a CA of its own"},
	}
}

// check reports settings that contradict each other.
func (e *Equipment) check(r *config.Report) {
	w := e.Webhook
	if w == (Equipment{}).Webhook || !r.Good("equipment") {
		return
	}
	if err := webhook.CheckURL(w.URL); err != nil {
		r.Add("equipment.webhook.url", err.Error(), "")
	}
	if w.SecretFile == "" {
		r.Add("equipment.webhook.secret_file", "it is missing",
			"without it, nobody can tell who has sent an event: echo whsec_$(openssl rand -base64 32) >FILE")
	}
	if e.History == 0 {
		r.Add("equipment.history", "equipment.webhook needs it", "that knows the device before")
	}
}

func (e *Equipment) Policy() *binding.EquipmentPolicy {
	status := func(s string) binding.EquipmentStatus { return binding.EquipmentStatus(strings.ToUpper(s)) }
	return &binding.EquipmentPolicy{ListsLast: e.Lists == "last", OtherDevice: status(e.OtherDevice),
		OtherSubscription: status(e.OtherSubscription), NotInLot: status(e.NotInLot)}
}
