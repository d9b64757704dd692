package main

// examples are lines to type, for the help and the manual page.
var examples = map[string]string{
	"keysvc init": `keysvc init --token 'pkcs11:token=operator?module-path=/usr/lib/softhsm/libsofthsm2.so&` +
		`pin-source=file:/etc/kmehsm/operator.pin'
keysvc init --config /etc/kmehsm/keysvc.yaml`,
	"keysvc tokens": `keysvc tokens /usr/lib/softhsm/libsofthsm2.so
keysvc tokens --json`,
	"keysvc check":             `keysvc check --config keysvc.yaml`,
	"keysvc transport new":     `keysvc transport new --out transport.json`,
	"keysvc transport list":    `keysvc transport list`,
	"keysvc transport destroy": `keysvc transport destroy 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4`,
	"keysvc enroll": `keysvc enroll enrolment.jws --manufacturer manufacturer.pem --directory file:/srv/directory ` +
		`\
    --thumbprint 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4`,
	"keysvc lot import":        `keysvc lot import L1.jws`,
	"keysvc lot list":          `keysvc lot list --json`,
	"keysvc lot retire":        `keysvc lot retire L1 --reason 'its key has leaked'`,
	"keysvc manufacturer list": `keysvc manufacturer list`,
	"keysvc manufacturer distrust": `keysvc manufacturer distrust 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4 \
    --reason stolen`,
	"keysvc manufacturer trust": `keysvc manufacturer trust 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4 \
    --reason found`,
	"keysvc device": `keysvc device 35209900000001`,
	"keysvc binding list": `keysvc binding list
keysvc binding list --imei 35209900000001 --json
keysvc binding list --state active --since 24h --count
keysvc binding list --limit 100 --after 001010000000001`,
	"keysvc binding explain": `keysvc binding explain 001010000000001`,
	"keysvc binding report":  `keysvc binding report --json`,
	"keysvc binding show":    `keysvc binding show 001010000000001`,
	"keysvc binding revoke":  `keysvc binding revoke 001010000000001`,
	"keysvc binding open":    `keysvc binding open 001010000000001 --ttl 24h`,
	"keysvc equipment add": `keysvc equipment add 35209900000001 --status blacklisted --reason 'stolen, case 4711'
keysvc equipment add 35209900-35209949 --status whitelisted --reason 'our routers'`,
	"keysvc equipment remove":      `keysvc equipment remove 35209900000001 --reason found`,
	"keysvc equipment import":      `keysvc equipment import devices.csv`,
	"keysvc equipment list":        `keysvc equipment list --json`,
	"keysvc equipment show":        `keysvc equipment show imsi-001010000000001`,
	"keysvc store verify":          `keysvc store verify`,
	"keysvc store backup":          `keysvc store backup --out /backup/keysvc.db`,
	"keysvc store accept-rollback": `keysvc store accept-rollback --reason 'backup of Monday, after the fire'`,
	"keysvc store log":             `keysvc store log --imsi 001010000000001`,
	"keysvc store migrate": `keysvc store migrate --from sqlite:/var/lib/kmehsm/keysvc.db --to ` +
		`'postgres://keysvc@db/keysvc'`,
	"keysvc store upgrade":  `keysvc store upgrade --store 'postgres://owner@db/keysvc' --role keysvc`,
	"keysvc backup prepare": `keysvc backup prepare --out restore-key.json`,
	"keysvc backup create": `keysvc backup create --to restore-key.json --so-pin-source file:/run/so.pin --out ` +
		`backup.json \
    --thumbprint 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4`,
	"keysvc backup restore": `keysvc backup restore backup.json \
    --thumbprint 7a0Zr6G0l1sWmJ3qv4u5yXcB2nD8eF9gH1iJ2kL3mN4`,
	"keysvc storage list":   `keysvc storage list`,
	"keysvc storage rotate": `keysvc storage rotate --so-pin-source file:/run/so.pin`,
	"keysvc storage retire": `keysvc storage retire`,
	"keysvc serve": `keysvc serve
keysvc serve --config /etc/kmehsm/keysvc.yaml`,
	"keysvc doctor": `keysvc doctor --json`,
	"keysvc help":   `keysvc help lot import`,
	"keysvc completion": `keysvc completion bash > ~/.local/share/bash-completion/completions/keysvc
. <(keysvc completion bash)`,
	"keysvc man": `keysvc man | man -l -`,
}
