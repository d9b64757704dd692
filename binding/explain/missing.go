package explain

import (
	"fmt"

	"github.com/kmehsm/kmehsm/binding"
)

// Missing says how much the ledger has lost, and how much of that comes back from the audit logs, if any was named, but
// for the lines that are left out.
func Missing(m *binding.Missing, logs bool, leftOut int) string {
	if !logs {
		return fmt.Sprintf("The ledger has lost at least %d entries. They are not known: no audit log was named "+
			"(audit_log of the configuration).", m.Unknowns())
	}
	text := fmt.Sprintf("The ledger has lost %d entries; %d come back from the audit log, and at least %d are not "+
		"known.", m.Lost, len(m.Lines)-leftOut, m.Unknowns())
	if leftOut > 0 {
		text += fmt.Sprintf(" %d of the audit log were left out: rows that somebody else has written have their KMEs.",
			leftOut)
	}
	return text
}

// MissingLoss says what is lost for good when that is accepted; revoke is [binding.Acceptance.RevokeUnknown].
func MissingLoss(m *binding.Missing, revoke bool) string {
	switch {
	case m.Unknowns() == 0:
		return "The KMEs of devices that were bound since are lost for good: these are bound no more, and their " +
			"subscriptions are named."
	case revoke:
		return "Every binding whose end may be among what is not known is revoked: its subscription can then be " +
			"bound to any device, and KMEs that were used since can be used again."
	}
	return "What is not known is lost for good: KMEs that were used since can be used again, devices that were bound " +
		"since are not, and what was revoked since is not."
}
